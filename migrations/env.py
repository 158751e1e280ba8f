"""Run by Alembic: migrate the engine that `migrations.config` was given."""

from typing import Literal

from alembic import context
from sqlalchemy import text

from app.shared.tables import Base, UtcDateTime

LOCK = 0x7175616E  # of PostgreSQL's advisory locks: one migration at a time


def _render(kind: str, value: object, _: object) -> str | Literal[False]:
    """Migrations name the type that the database sees, not our class around it."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(value, UtcDateTime) else False


engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        render_item=_render,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        context.run_migrations()
    connection.commit()
