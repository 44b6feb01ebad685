"""jobs.look_id without a foreign key: looks are never deleted, the check took a tenth of a submit

SQLite would make the whole table anew for it, and gains little: there it stays.

Revision ID: 0011
Revises: 0010
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

NAME = "fk_jobs_look_id_looks"


def upgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint(NAME, "jobs", type_="foreignkey")


def downgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.create_foreign_key(NAME, "jobs", "looks", ["look_id"], ["id"])
