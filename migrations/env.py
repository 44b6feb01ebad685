"""Runs migrations on the connection that `jobs.migrate` hands over, or on DATABASE_URL."""

from alembic import context
from sqlalchemy import Connection

from jobs import database, schema, settings


def _is_compared(
    _thing: object, name: str | None, kind: str, _is_reflected: bool, _other: object
) -> bool:
    """SQLite has kept a foreign key that PostgreSQL has dropped: see 0011."""
    return (kind, name) != ("foreign_key_constraint", "fk_jobs_look_id_looks")


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=schema.Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        include_object=_is_compared,
        user_module_prefix="schema.",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with database.connect(settings.load()).engine.connect() as own:
        _run(own)
        own.commit()
