"""The command `quantry`."""

from quantry.cli.commands import app


def main() -> None:
    app()


__all__ = ["app", "main"]
