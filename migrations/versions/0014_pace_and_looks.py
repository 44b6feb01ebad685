"""the latest failed jobs of a batch, and the latest videos of a look, each by an index

Revision ID: 0014
Revises: 0013
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _index("ix_jobs_failed", ["batch_id", "finished_at"], "state = 'failed'")
    _index("ix_jobs_look", ["look_id", "finished_at"], "state = 'succeeded'")


def downgrade() -> None:
    op.drop_index("ix_jobs_look", "jobs")
    op.drop_index("ix_jobs_failed", "jobs")


def _index(name: str, columns: list[str], where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, "jobs", columns, sqlite_where=condition, postgresql_where=condition)
