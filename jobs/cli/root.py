"""The command group. A command's module is imported when the command is called, not before."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import click

from jobs.cli import failures, options


class Lazy(NamedTuple):
    """Where a command lives and what `rushes --help` says of it."""

    module: str
    attribute: str
    summary: str


SECTIONS: dict[str, dict[str, Lazy]] = {
    "Batches": {
        "submit": Lazy("submit", "submit", "Store the prompts of a file as a batch."),
        "estimate": Lazy("estimate", "estimate", "Say how long a file or a batch will take."),
        "list": Lazy("listing", "list_batches", "List the batches, newest first."),
        "show": Lazy("listing", "show", "Show a batch or a job."),
        "watch": Lazy("waiting", "watch_batch", "Follow a batch until it is finished."),
        "wait": Lazy("waiting", "wait_for_batch", "Wait until a batch is finished."),
        "pause": Lazy("ordering", "pause", "Start no more jobs of batches, or not these jobs."),
        "resume": Lazy(
            "ordering", "resume", "Let paused jobs, and the jobs of paused batches, start again."
        ),
        "prioritize": Lazy("ordering", "prioritize", "Change the order of what waits."),
        "cancel": Lazy("changes", "cancel", "Cancel batches or jobs."),
        "retry": Lazy("changes", "retry", "Queue failed or cancelled jobs again."),
        "logs": Lazy("story", "logs", "Tell what happened to a batch or a job."),
        "download": Lazy("fetch", "download_batch", "Fetch the finished videos of a batch."),
        "schedule": Lazy("schedule_commands", "schedule", "Submit batches by a cron rule."),
        "presets": Lazy("preset_commands", "presets", "List the presets, or show one."),
    },
    "Machines": {
        "render": Lazy("render", "render", "Render the prompts of a file here and now."),
        "up": Lazy("processes", "up", "Run everything on this machine."),
        "demo": Lazy("processes", "demo", "Render a few tiny videos, to see that all works."),
        "web": Lazy("processes", "web", "Serve the HTTP API."),
        "notify": Lazy("notify_commands", "notify", "Tell others when batches are finished."),
        "token": Lazy("token_commands", "token", "Manage the tokens of the HTTP API."),
        "worker": Lazy("processes", "worker", "Render: one process per device."),
        "dispatcher": Lazy("processes", "dispatcher", "Hand queued jobs to the workers."),
        "workers": Lazy("worker_commands", "workers", "List the workers, or test one."),
        "gc": Lazy("cleaning", "gc", "Delete what is old, by the settings that say for how long."),
        "migrate": Lazy("system", "migrate_database", "Bring the database to this version."),
        "doctor": Lazy("system", "doctor_command", "Check every part and say what to do."),
    },
    "Models": {
        "distill": Lazy("distill", "distill", "Train a 4-step student from a many-step model."),
        "quantize": Lazy("system", "quantize", "Write a model's transformer with 8-bit weights."),
    },
}
COMMANDS = {name: lazy for section in SECTIONS.values() for name, lazy in section.items()}

OTHER_NAMES = {
    "status": "show",
    "get": "show",
    "ls": "list",
    "batches": "list",
    "reorder": "prioritize",
    "priority": "prioritize",
    "suspend": "pause",
    "unpause": "resume",
    "clean": "gc",
    "cleanup": "gc",
    "prune": "gc",
    "purge": "gc",
    "requeue": "retry",
    "fetch": "download",
    "run": "submit",
    "stop": "cancel",
    "rm": "cancel",
    "scheduler": "dispatcher",
    "cron": "schedule",
    "schedules": "schedule",
    "init": "migrate",
    "start": "up",
    "serve": "web",
    "server": "web",
    "api": "web",
    "webhook": "notify",
    "webhooks": "notify",
}
"""What the same thing is called in other tools."""


class Rushes(click.Group):
    """Loads commands late and turns every failure into a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        command = getattr(importlib.import_module(f"jobs.cli.{lazy.module}"), lazy.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in OTHER_NAMES:
            hint = f"no such command {name!r}: did you mean {OTHER_NAMES[name]!r}?"
            raise click.UsageError(hint, ctx)
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand:
            raise click.exceptions.NoSuchCommand(name, possibilities=COMMANDS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            name = ctx.invoked_subcommand
            command = None if name is None else self.get_command(ctx, name)
            if error.ctx is None and command is not None:  # click has none for a missing value
                error.ctx = click.Context(command, parent=ctx, info_name=name)
            raise

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, lazy.summary) for name, lazy in commands.items()])

    def main(  # type: ignore[override]  # ends the process, as click does by default
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False

        def run() -> object:
            return super(Rushes, self).main(arguments, prog_name or "rushes", **extra)

        sys.exit(failures.exit_code_of(run, as_json=options.asks_for_json(arguments)))


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from jobs.cli import version  # importlib.metadata takes its time

        click.echo(f"rushes {version.installed()}")
        ctx.exit()


@click.group(
    "rushes",
    cls=Rushes,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="BATCH is an id, its unique beginning, or `latest`. JOB is a number or BATCH/CUSTOM_ID.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
@options.no_color
@click.pass_context
def main(ctx: click.Context) -> None:
    """Render prompt batches into videos overnight."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
