"""`rushes estimate`."""

from pathlib import Path
from typing import Any

import click

from jobs import estimates, queries, queues, settings, submission
from jobs.cli import connections, options, output, prompt_files


@click.command()
@click.argument("subject", metavar="FILE|BATCH")
@click.option("--preset", metavar="NAME|FILE", help="For a FILE: the look.")
@click.option("--repeat", type=int, default=1, show_default=True, help="Videos per prompt.")
@options.output
def estimate(subject: str, preset: str | None, repeat: int, as_json: bool) -> None:
    """Say how long a file or a batch will take.

    From what the latest jobs of the same look took here; nothing is guessed where there are none.
    With --preset the name is a FILE, which is checked and not stored; else a BATCH: what is left.
    """
    if preset is None and Path(subject).is_file():
        raise options.misused(f"{subject} is a file: give --preset")
    if preset is None and repeat != 1:
        raise options.misused("--repeat is for a FILE: give --preset")
    config = settings.load()
    db = connections.open_database(config)
    if preset is None:
        with db.reading() as session:
            found = estimates.of_batch(session, queries.find_batch(session, subject).id)
    else:
        chosen = prompt_files.preset(preset, config)
        with prompt_files.opened(subject) as (stream, source):
            file = submission.PromptFile(
                stream=stream,
                source=source,
                format=prompt_files.detected(stream, source),
                options=submission.Options(preset=chosen, repeat=repeat),
                images=prompt_files.images(config, subject, chosen, check_only=True),
            )
            plan = submission.plan(file)
        waited_in = {queues.of_model(look.model_path) for look in file.looks.values()}
        with db.reading() as session:
            found = estimates.of_jobs(session, plan.looks, queues=waited_in)
    if as_json:
        output.emit(_shape(found))
    else:
        _tell(found)


def _tell(found: estimates.Estimate) -> None:
    measured = sum(look.measured for look in found.looks)
    hours = f"{found.device_seconds / 3600:,.2f}"
    left = found.seconds_left
    output.facts(
        [
            ("jobs", f"{found.jobs:,}"),
            ("measured", f"{measured:,} finished jobs of the same looks" if measured else ""),
            ("GPU hours", hours if measured else ""),
            ("workers", f"{found.workers:,} alive that can take them" if found.jobs else ""),
            ("time", f"about {output.duration(left)}, if nothing else is rendered" if left else ""),
        ]
    )
    if found.unmeasured_jobs:
        output.note(
            f"note: {output.count(found.unmeasured_jobs, 'job')} of looks without a measured job "
            "here: not in these figures. Submit a few of them first, then ask again"
        )


def _shape(found: estimates.Estimate) -> dict[str, Any]:
    return {
        "jobs": found.jobs,
        "unmeasured_jobs": found.unmeasured_jobs,
        "gpu_hours": round(found.device_seconds / 3600, 4),
        "workers": found.workers,
        "seconds_left": found.seconds_left,
        "looks": [
            {
                "look_id": look.look_id,
                "jobs": look.jobs,
                "measured": look.measured,
                "mean_seconds": look.mean_seconds,
            }
            for look in found.looks
        ],
    }
