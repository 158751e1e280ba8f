"""Uploaded images: how many of them, and of how many classes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_22_images"
down_revision = "2026_11_21_jobs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("images", sa.BigInteger(), nullable=True))
    op.add_column("datasets", sa.Column("classes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("datasets", "classes")
    op.drop_column("datasets", "images")
