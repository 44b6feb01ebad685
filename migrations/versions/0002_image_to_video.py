"""image to video, memory modes

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("image_key", sa.Text(), nullable=True))
    op.add_column("attempts", sa.Column("memory", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "memory")
    op.drop_column("jobs", "image_key")
