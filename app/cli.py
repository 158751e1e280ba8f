"""`quantry-server`: serve (all in one), and api, worker, migrate, keys, doctor for production.

Each command imports what it needs when it runs: `serve` and `worker` are up sooner without the rest.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.shared import lifeline
from app.shared.errors import ServiceError, StartError
from app.shared.settings import Settings, get_settings
from quantry import __version__

cli = typer.Typer(
    name="quantry-server", no_args_is_help=True, add_completion=False, help="The Quantry server."
)
keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
cli.add_typer(keys, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantry-server {__version__}")
        raise typer.Exit


@cli.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """The Quantry server."""


Host = Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(help="0 takes any free port; default 8000.", min=0, max=65535)]


@cli.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="Folder of database, queue, uploads and results.")] = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """Run API, broker and one worker on this machine."""
    from app.serve import serve as run
    from app.shared.logs import configure_logs

    configure_logs()
    given = {"data": data, "host": host, "port": port}
    settings = get_settings().model_copy(update={name: v for name, v in given.items() if v is not None})
    run(settings)


@cli.command()
def api(
    host: Host = None,
    port: Port = None,
    fd: Annotated[int | None, typer.Option(help="A listening socket, instead of host and port.")] = None,
    lifeline_fd: Annotated[int | None, typer.Option(help="End when this pipe reaches its end.")] = None,
    first_run: Annotated[
        bool, typer.Option(help="Migrate, and write a first key to the data folder.")
    ] = False,
) -> None:
    """Run the HTTP server, and the loop that keeps the queue moving."""
    if lifeline_fd is not None:
        lifeline.watch(lifeline_fd)
    from app import first_run as preparation
    from app import server
    from app.main import create_app
    from app.shared.database import sessions
    from app.shared.dispatcher import Dispatcher
    from app.shared.logs import configure_logs

    configure_logs()
    settings = get_settings()
    if first_run:
        preparation.prepare(settings)
    host, port = host or settings.host, settings.port if port is None else port
    require_ready(settings)
    if fd is None:
        require_keys_beyond_loopback(host)
    dispatcher = Dispatcher(sessions(), settings)
    dispatcher.start()
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    try:
        server.run(create_app(settings), host=host, port=port, sockets=sockets)
    finally:
        dispatcher.stop.set()


@cli.command()
def worker() -> None:
    """Run a worker: one job at a time, on the device that QUANTRY_DEVICE names."""
    require_ready(get_settings())
    os.execv(sys.executable, [sys.executable, "-m", "worker"])


@cli.command()
def migrate() -> None:
    """Bring the database to the schema of this version."""
    from sqlalchemy.exc import SQLAlchemyError

    import migrations
    from app.shared.database import make_engine
    from app.shared.logs import configure_logs

    configure_logs()
    engine = make_engine(get_settings().database)
    try:
        migrations.upgrade(engine)
    except SQLAlchemyError as error:
        raise StartError(f"the database cannot be migrated: {error}") from error
    finally:
        engine.dispose()
    typer.echo("the database is up to date")


@cli.command()
def doctor() -> None:
    """Check database, broker, storage, the worker's packages and the model roots; say what is wrong."""
    from app.doctor import examine

    failed = False
    for name, problem in examine(get_settings()):
        failed = failed or problem is not None
        typer.echo(f"{name:<10} {'ok' if problem is None else problem}")
    if failed:
        raise typer.Exit(1)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    owner: Annotated[str, typer.Option(help="Whose jobs the key sees.")] = "local",
    scope: Annotated[list[str] | None, typer.Option(help="read, write or admin; repeatable.")] = None,
    days: Annotated[int | None, typer.Option(help="Days until it expires; default: never.", min=1)] = None,
) -> None:
    """Make a key and print it: it is shown this once."""
    from app import security
    from app.shared.database import sessions

    scopes = [found for found in security.SCOPES if scope is None or found in scope]
    if scope is not None and set(scope) - set(scopes):
        raise typer.BadParameter(f"scopes are {', '.join(security.SCOPES)}")
    lifetime = timedelta(days=days) if days is not None else None
    with sessions()() as session:
        _, key = security.create_key(session, owner=owner, name=name, scopes=scopes, lifetime=lifetime)
    typer.echo(key)


@keys.command("list")
def list_keys() -> None:
    """Show every key, without its secret."""
    from app import security
    from app.shared.database import sessions

    with sessions()() as session:
        for key in security.list_keys(session):
            state = "revoked" if key.revoked_at else f"until {key.expires_at or 'revoked'}"
            typer.echo(f"{key.id}  {key.owner:<16} {','.join(key.scopes):<18} {state:<16} {key.name}")


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id: the second part of the key.")]) -> None:
    """Refuse a key from now on."""
    from app import security
    from app.shared.database import sessions

    with sessions()() as session:
        security.revoke_key(session, key_id)
    typer.echo(f"{key_id} is revoked")


def require_ready(settings: Settings) -> None:
    """Raises StartError without a broker, or on a database of another version."""
    import migrations
    from app.shared.database import make_engine

    if settings.redis_url is None:
        raise StartError("no broker: set QUANTRY_REDIS_URL, or use `quantry-server serve`")
    engine = make_engine(settings.database)
    try:
        if not migrations.is_current(engine):
            raise StartError(
                "the database has another schema than this version: run `quantry-server migrate`"
            )
    finally:
        engine.dispose()


def require_keys_beyond_loopback(host: str) -> None:
    """Raises StartError if others could reach a server on which no key exists."""
    from app import security
    from app.shared.database import sessions

    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if loopback:
        return
    with sessions()() as session:
        if not any(key.revoked_at is None for key in security.list_keys(session)):
            raise StartError(
                f"no API key exists: run `quantry-server keys create` before listening on {host}"
            )


def main() -> None:
    """Entry point: expected errors are one line on standard error and status 2."""
    try:
        cli()
    except ValidationError as error:
        for entry in error.errors():
            name = "_".join(["QUANTRY", *map(str, entry["loc"])]).upper()
            typer.echo(f"quantry-server: {name}: {entry['msg']}", err=True)
    except ServiceError as error:
        typer.echo(f"quantry-server: {error}", err=True)
    sys.exit(2)
