"""`python -m quantry` is the command `quantry`."""

from quantry.cli import main

if __name__ == "__main__":
    main()
