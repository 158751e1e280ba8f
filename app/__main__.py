"""`python -m app` is `quantry-server`."""

from app.cli import main

main()
