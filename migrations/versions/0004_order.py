"""owners, order, deadlines; indexes that cost a submit nothing

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MOMENTS = (
    "results_lease_until",
    "results_expired_at",
    "paused_at",
    "deadline_at",
    "expired_at",
    "served_at",
)


def upgrade() -> None:
    op.create_table(
        "owners",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("served_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_owners"),
    )
    op.add_column(
        "batches", sa.Column("owner", sa.String(length=200), nullable=False, server_default="")
    )
    op.add_column("batches", sa.Column("boost", sa.Integer(), nullable=False, server_default="0"))
    for name in MOMENTS:
        op.add_column("batches", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    _index("ix_batches_unfinished", "batches", ["owner", "id"], "finished_at IS NULL")
    op.drop_index("ix_jobs_runnable", "jobs")
    op.drop_index("ix_jobs_batch_id_state", "jobs")
    _index("ix_jobs_queued", "jobs", ["batch_id", "queue", "rank", "id"], "state = 'queued'")
    _index("ix_jobs_started", "jobs", ["batch_id", "state", "position"], "state <> 'queued'")
    _index("ix_jobs_succeeded", "jobs", ["batch_id", "finished_at"], "state = 'succeeded'")


def downgrade() -> None:
    for name in ("ix_jobs_succeeded", "ix_jobs_started", "ix_jobs_queued"):
        op.drop_index(name, "jobs")
    op.create_index("ix_jobs_batch_id_state", "jobs", ["batch_id", "state"])
    _index("ix_jobs_runnable", "jobs", ["queue", "rank", "id"], "state = 'queued'")
    op.drop_index("ix_batches_unfinished", "batches")
    for name in (*reversed(MOMENTS), "boost", "owner"):
        op.drop_column("batches", name)
    op.drop_table("owners")


def _index(name: str, table: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)
