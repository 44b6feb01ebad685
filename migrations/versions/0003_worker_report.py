"""what a worker holds, who launched it, what it refuses

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COUNTS = ("renders", "loads", "lora_switches")


def upgrade() -> None:
    op.add_column("workers", sa.Column("launcher", sa.Text(), nullable=True))
    for name in COUNTS:
        column = sa.Column(name, sa.Integer(), nullable=False, server_default="0")
        op.add_column("workers", column)
    op.add_column("workers", sa.Column("resident", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("workers", sa.Column("device_used_bytes", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("host_used_bytes", sa.BigInteger(), nullable=True))
    op.create_table(
        "refusals",
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("queue", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("worker", "queue", name="pk_refusals"),
    )


def downgrade() -> None:
    op.drop_table("refusals")
    for name in ("host_used_bytes", "device_used_bytes", "resident", *COUNTS, "launcher"):
        op.drop_column("workers", name)
