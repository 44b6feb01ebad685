"""`rushes gc`."""

from collections.abc import Sequence
from typing import Any

import click

from jobs import cleaning, settings, sizes
from jobs.cli import connections, exits, options, output


@click.command()
@click.option("--apply", is_flag=True, help="Delete it. Without this, it is only counted.")
@click.option(
    "--only",
    "kinds",
    multiple=True,
    type=click.Choice([kind.value for kind in cleaning.Kind]),
    help="May be repeated; everything by default.",
)
@options.output
def gc(apply: bool, kinds: tuple[str, ...], as_json: bool) -> int:
    """Delete what is old, by the settings that say for how long.

    RUSHES_KEEP_..._DAYS; results and rows of batches stay for ever unless these are set. Nothing
    that an unfinished batch or a schedule needs is touched. Counts only, unless told to --apply.
    """
    config = settings.load()
    db = connections.open_database(config)
    chosen = [cleaning.Kind(kind) for kind in kinds] or list(cleaning.Kind)
    outcomes = list(cleaning.Cleaner(config, db, apply=apply).run(chosen))
    if as_json:
        output.emit({"applied": apply, "kinds": [_shape(outcome) for outcome in outcomes]})
    else:
        _tell(outcomes, apply=apply)
    return exits.ERROR if any(outcome.error for outcome in outcomes) else exits.OK


def _tell(outcomes: Sequence[cleaning.Outcome], *, apply: bool) -> None:
    headers = ("KIND", "KEPT FOR", "DELETED" if apply else "WOULD BE DELETED", "SIZE")
    output.table(headers, [_row(outcome) for outcome in outcomes])
    for outcome in outcomes:
        if outcome.error:
            output.note(f"{outcome.kind}: {outcome.error}")
    if not apply:
        output.note("nothing was deleted: rushes gc --apply does it")


def _row(outcome: cleaning.Outcome) -> tuple[str, ...]:
    days = outcome.keep_days
    return (
        outcome.kind,
        "ever" if days is None else f"{days:g} days",
        ", ".join(
            f"{number:,} {name.replace('_', ' ')}" for name, number in outcome.counts.items()
        ),
        "" if outcome.size_bytes is None else sizes.words(outcome.size_bytes),
    )


def _shape(outcome: cleaning.Outcome) -> dict[str, Any]:
    return {
        "kind": outcome.kind,
        "keep_days": outcome.keep_days,
        "counts": outcome.counts,
        "bytes": outcome.size_bytes,
        "error": outcome.error,
    }
