"""workers that are taken out until a self-test has passed

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("suspects", sa.JSON(none_as_null=True), nullable=True))
    op.add_column(
        "workers", sa.Column("removals", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column("workers", sa.Column("tested_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("workers", sa.Column("test_failure", sa.Text(), nullable=True))
    needs_test = sa.Column("needs_test", sa.Boolean(), nullable=False, server_default=sa.false())
    op.add_column("refusals", needs_test)


def downgrade() -> None:
    # An older version knows no tests: for it, who waits for one is back.
    op.drop_column("refusals", "needs_test")
    for name in ("test_failure", "tested_at", "removals", "suspects"):
        op.drop_column("workers", name)
