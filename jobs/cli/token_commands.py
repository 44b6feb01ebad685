"""`rushes token`."""

from datetime import datetime

import click

from jobs import database, settings, tokens
from jobs.cli import connections, options, output
from jobs.schema import ApiToken


@click.group()
def token() -> None:
    """Manage the tokens of the HTTP API."""


@token.command()
@click.argument("name")
@click.option("--owner", default="", callback=options.owner, help="Whose batches its batches are.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in tokens.Scope]),
    default=("submit", "read"),
    show_default=True,
    help="May be repeated.",
)
@click.option("--days", type=options.Whole(min=1, max=36500), help="Valid for this long.")
@options.output
def create(name: str, owner: str, scopes: tuple[str, ...], days: int | None, as_json: bool) -> None:
    """Make a token and show it: now and never again."""
    db = connections.open_database(settings.load())
    with db.transaction() as session:
        row, secret = tokens.create(
            session, name=name, owner=owner, scopes=[tokens.Scope(s) for s in scopes], days=days
        )
    if as_json:
        output.emit(_shape(row) | {"token": secret})
    else:
        output.line(secret)
        output.note(f"token {row.id} ({', '.join(row.scopes)}): it is not shown again")


@token.command("list")
@options.output
def list_tokens(as_json: bool) -> None:
    """List the tokens; never what they are."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found, now = tokens.every(session), database.now(session)
    if as_json:
        output.emit({"tokens": [_shape(row) for row in found]})
    elif found:
        headers = ("TOKEN", "NAME", "OWNER", "SCOPES", "STATE", "CREATED", "EXPIRES", "USED")
        output.table(
            headers,
            [
                (
                    row.id,
                    output.cut(row.name, 40),
                    output.cut(row.owner, 40),
                    ", ".join(row.scopes),
                    _state(row, now),
                    output.when(row.created_at),
                    output.when(row.expires_at),
                    output.when(row.used_at),
                )
                for row in found
            ],
        )
    else:
        output.note("no tokens yet: make one with `rushes token create`")


@token.command()
@click.argument("token_id", metavar="TOKEN")
@options.output
def revoke(token_id: str, as_json: bool) -> None:
    """End a token. TOKEN is its id, as `rushes token list` shows it."""
    db = connections.open_database(settings.load())
    changed = db.write(tokens.revoke, token_id)
    if as_json:
        output.emit({"token_id": token_id, "revoked": True, "changed": changed})
    else:
        output.line(f"token {token_id} is revoked" + ("" if changed else " already"))


def _state(row: ApiToken, now: datetime) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "expired" if row.expires_at is not None and row.expires_at <= now else "valid"


def _shape(row: ApiToken) -> dict[str, object]:
    return {
        "token_id": row.id,
        "name": row.name,
        "owner": row.owner,
        "scopes": row.scopes,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
        "used_at": row.used_at,
    }
