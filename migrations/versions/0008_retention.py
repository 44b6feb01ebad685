"""what is deleted as old; heartbeats that change no index

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

MOMENTS = ("results_removed_at", "inputs_expired_at", "forgotten_at")


def upgrade() -> None:
    for name in MOMENTS:
        op.add_column("batches", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "inputs",
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("held_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("condemned_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("key", name="pk_inputs"),
    )
    _exchange_live("worker")
    has_image = sa.text("image_key IS NOT NULL")
    op.create_index(
        "ix_jobs_image",
        "jobs",
        ["image_key", "batch_id"],
        sqlite_where=has_image,
        postgresql_where=has_image,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_image", "jobs")
    _exchange_live("lease_until")
    op.drop_table("inputs")
    for name in reversed(MOMENTS):
        op.drop_column("batches", name)


def _exchange_live(column: str) -> None:
    is_live = sa.text("state IN ('running', 'rendered')")
    op.drop_index("ix_attempts_live", "attempts")
    op.create_index(
        "ix_attempts_live", "attempts", [column], sqlite_where=is_live, postgresql_where=is_live
    )
