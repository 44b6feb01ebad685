"""`rushes migrate`, `rushes doctor` and `rushes quantize`."""

import json
from dataclasses import asdict
from pathlib import Path

import click
from alembic.util import CommandError

from jobs import database, errors, logs, migrate, parts, settings, sizes, store_mark, stores
from jobs.cli import connections, exits, options, output
from jobs.doctor import checks, examination, weights


@click.command("migrate")
@click.option(
    "--revision",
    default="head",
    show_default=True,
    callback=options.not_empty,
    help="Go up to this one only.",
)
@click.option(
    "--store",
    "moves_store",
    is_flag=True,
    help="Instead: from now on the results lie in the store of RUSHES_RESULTS_URL.",
)
@options.output
def migrate_database(revision: str, moves_store: bool, as_json: bool) -> None:
    """Bring the database to this version.

    Any number of them may start at once: one works, the others wait.
    """
    if moves_store:
        _move_store(as_json=as_json)
        return
    config = settings.load()
    logs.configure(config, level="WARNING")
    db = database.connect(config)
    click.get_current_context().call_on_close(db.close)
    try:
        before, after = migrate.upgrade(db, revision=revision)
    except CommandError as error:
        raise errors.NotFound(f"--revision {revision}: {error}") from None
    if as_json:
        output.emit({"before": before, "after": after})
    elif migrate.is_newer(after):
        output.line(f"the database is at {after}, of a newer version: it is left alone")
    elif before == after:
        output.line(f"the database is at {after or 'nothing'} already")
    else:
        output.line(f"the database went from {before or 'nothing'} to {after}")


def _move_store(*, as_json: bool) -> None:
    config = settings.load()
    logs.configure(config, level="WARNING")
    store = stores.open_store(config)
    moved = store_mark.move(connections.open_database(config), store)
    if as_json:
        output.emit({"store": store.url, "key": moved.key, "changed": moved.changed})
    elif not moved.changed:
        output.line(f"already {store.url}: nothing changed but the mark in it")
    else:
        output.line(f"the farm's results lie in {store.url} from now on")
        output.note("nothing was copied; restart what runs with the address before it")


@click.command("doctor")
@click.option(
    "--preset",
    metavar="NAME|FILE",
    callback=options.not_empty,
    help="Say whether its model is here and fits the devices of this machine; nothing else.",
)
@options.output
def doctor_command(preset: str | None, as_json: bool) -> int:
    """Check every part and say what to do.

    Exit code 1 when something fails; warnings are no failure.
    """
    found = []
    for check in weights.fits(settings.load(), preset) if preset else examination.examine():
        found.append(check)
        if not as_json:
            _print_check(check)
    if as_json:
        output.emit({"checks": [asdict(check) for check in found]})
    failed = sum(check.status == "fail" for check in found)
    if not as_json:
        warned = sum(check.status == "warn" for check in found)
        output.line(f"{len(found) - failed - warned} ok, {warned} warnings, {failed} failures")
    return exits.ERROR if failed else exits.OK


def _print_check(check: checks.Check) -> None:
    mark = output.state(check.status) + " " * (4 - len(check.status))
    output.line(f"{mark}  {check.name}: {output.plain(check.seen)}")
    if check.advice:
        output.line(f"      -> {output.plain(check.advice)}")


@click.command("quantize")
@click.argument("model", metavar="MODEL", callback=options.not_empty)
@click.option(
    "--scheme", type=click.Choice(["fp8", "int8"]), default="fp8", show_default=True, help="Form."
)
@click.option(
    "--to",
    "target",
    type=options.NamedPath(path_type=Path),
    help="File, or of a model with two a folder. Default: where presets look in MODEL.",
)
@options.output
def quantize(model: str, scheme: str, target: Path | None, as_json: bool) -> None:
    """Write a model's transformer with 8-bit weights; of a model with two, both.

    MODEL is a folder, or the name of one in RUSHES_MODELS_DIR. Tells how far the new weights are
    from the old ones, and what a preset says to use them. Reads one tensor at a time.
    """
    config = settings.load()
    folder = Path(model) if Path(model).is_dir() else config.models_dir / model
    output.note(f"reading {folder}")
    try:
        files = parts.FIND_MODEL.load()(folder)
        form = parts.QUANTIZATION_SCHEME.load()(scheme)
        target = target or parts.QUANTIZED_PLACE.load()(files, form)
        report = parts.QUANTIZE.load()(files, target, form)
    except (ValueError, FileExistsError) as error:
        raise errors.FileUnusable(str(error)) from error
    keys = _preset_keys(report.path, config.models_dir, has_two=bool(files.low_noise_transformer))
    worst = max(report.relative_errors, key=report.relative_errors.__getitem__, default=None)
    if as_json:
        output.emit(
            {
                "path": str(report.path),
                "scheme": scheme,
                "bytes": report.num_bytes,
                "relative_error": report.relative_error,
                "relative_errors": dict(report.relative_errors),
                "preset": keys,
            }
        )
        return
    output.line(f"{report.path}: {sizes.words(report.num_bytes)}")
    output.line(
        f"{len(report.relative_errors)} matrices in {scheme}; relative error of all "
        f"{report.relative_error:.2%}"
        + (f", of the worst {report.relative_errors[worst]:.2%} ({worst})" if worst else "")
    )
    told = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items())
    output.line(f"in a preset: {told}")


def _preset_keys(path: Path, models_dir: Path, *, has_two: bool) -> dict[str, object]:
    """What makes a preset render with these weights, wherever they lie."""
    path, models_dir = path.resolve(), models_dir.resolve()
    named = str(path.relative_to(models_dir) if path.is_relative_to(models_dir) else path)
    if not has_two:
        return {"dit_quantized": True, "dit_quantized_ckpt": named}
    sides = {
        f"{side}_noise_quantized_ckpt": f"{named}/{side}_noise_model" for side in ("high", "low")
    }
    return {"dit_quantized": True, **sides}
