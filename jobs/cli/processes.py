"""`rushes dispatcher`, `rushes worker`, `rushes up`, `rushes web` and `rushes demo`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

from jobs import (
    beat,
    broker,
    database,
    direct,
    dispatch,
    firing,
    first_answer,
    logs,
    misspelt,
    parts,
    result_writer,
    settings,
)
from jobs.cli import connections, exits, options, output

CHECK_SECONDS = 10.0
EVERY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104  # only compared
THREAD_SECONDS = 10.0  # a schedule that is being made when we are told to stop

_devices = click.option(
    "--devices",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cpu:N|sim:N|0,1,...",
    help="auto: every GPU, else one process on the CPU; cpu:N: N of those; or GPU numbers. "
    "sim:N: devices that only sleep, for rehearsals.",
)


@click.command()
@click.option("--check", is_flag=True, help="Exit 0 if the dispatcher here is alive, else 1.")
def dispatcher(check: bool) -> int:
    """Hand queued jobs to the workers.

    Also ends the attempts of lost workers, writes the result files of finished batches, and submits
    the batches of schedules. Any number of dispatchers may run. Stops on SIGTERM and SIGINT.
    """
    config = settings.load()
    if check:
        return told_beat(beat.of_dispatcher(config), "dispatcher")
    db = connections.open_database(config, connect=database.connect_service)
    broker.Broker(config).refuse_wrong_kind()
    logs.configure(config)
    misspelt.warn()
    stop = stop_on_signals()
    first_answer.wait(db, stop=stop, alive=beat.of_dispatcher(config).touch)
    writer = result_writer.ResultWriter(config, db=db)
    # A thread: a million lines take a minute, and the next jobs are to be sent meanwhile. It is
    # not waited for: what it began is written again by whoever looks next.
    results = _beside("results", lambda: writer.run(stop), stop, wait_seconds=0.0)
    # Another: a large prompt file must not hold up the workers.
    schedules = _beside(
        "schedules",
        lambda: firing.Clockwork(config, db=db).run(stop),
        stop,
        wait_seconds=THREAD_SECONDS,
    )
    with results, schedules:
        # A finished job kicks it: perhaps it was the last of its batch.
        dispatch.Dispatcher(config, db=db, after_look=writer.look.set).run(stop)
    return exits.OK


@contextmanager
def _beside(
    name: str, work: Callable[[], None], stop: threading.Event, *, wait_seconds: float
) -> Iterator[None]:
    """A thread; what it raises ends all and is raised here."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            stop.set()  # without it this is half a dispatcher: whoever started it, restarts

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(wait_seconds)
    if failures:
        raise failures[0]


def told_beat(found: beat.Beat, what: str) -> int:
    age = found.age_seconds()
    if age is None:
        output.note(f"no {what} has run here: {found.path} is missing")
        return exits.ERROR
    output.line(f"last seen {output.duration(age)} ago")
    return exits.OK if found.is_alive() else exits.ERROR


def stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


@click.command()
@_devices
@click.option("--check", is_flag=True, help="Exit 0 if `rushes worker` here is alive, else 1.")
def worker(devices: str, check: bool) -> int:
    """Render: one process per device.

    Stops on SIGTERM and SIGINT: finishes its job within RUSHES_GRACE_SECONDS or gives it back.
    """
    config = settings.load()
    if check:
        return told_beat(beat.of_launcher(config), "worker")
    logs.configure(config)
    misspelt.warn()
    return int(parts.RUN_WORKERS.load()(config, devices=devices))


@click.command()
@_devices
def up(devices: str) -> int:
    """Run everything on this machine.

    Database, Redis, results store, dispatcher, workers and HTTP API; no Docker, no root. Other
    `rushes` commands find it through RUSHES_HOME. Ctrl-C stops it, and nothing is lost.
    """
    config = settings.load()
    logs.configure(config)
    misspelt.warn()
    from jobs import standalone

    return standalone.up(config, devices=devices, say=output.line)


@click.command()
@click.option("--host", metavar="ADDRESS", help="Default: RUSHES_WEB_HOST, 127.0.0.1.")
@click.option("--port", type=options.Whole(1, 65_535), help="Default: RUSHES_WEB_PORT, 8000.")
@click.option("--require-token", is_flag=True, default=None, help="On loopback too.")
@click.option("--check", is_flag=True, help="Exit 0 if the service here answers, else 1.")
def web(host: str | None, port: int | None, require_token: bool | None, check: bool) -> int | None:
    """Serve the HTTP API and the page.

    On loopback, for one person and without tokens; on any other address with tokens only. Stops on
    SIGTERM and SIGINT.
    """
    config = settings.load(web_host=host, web_port=port, web_require_token=require_token)
    if check:
        # That of `rushes up` may have found the port of the settings taken, by another farm even.
        up = settings.read_up_file(config.home) if host is None and port is None else {}
        host = up.get("RUSHES_WEB_HOST", config.web_host)
        return _told_answer(host, int(up.get("RUSHES_WEB_PORT", config.web_port)))
    connections.open_database(config)
    logs.configure(config)
    misspelt.warn()
    from jobs.web import server  # takes its time to import

    server.run(config, say=output.line)
    return None


def _told_answer(host: str, port: int) -> int:
    if host in EVERY_ADDRESS:
        host = "localhost"
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        with direct.opened(f"{address}/healthz", seconds=CHECK_SECONDS, is_here=True):
            output.line(f"{address} answers")
            return exits.OK
    except OSError as error:
        output.note(f"{address}: {error}")
        return exits.ERROR


@click.command()
@_devices
@options.no_color
def demo(devices: str) -> int:
    """Render a few tiny videos, to see that all works.

    Simulated devices are refused: they would render nothing. Beside a running `rushes up`, whose
    devices are used, --devices has no effect.
    """
    config = settings.load()
    logs.configure(config, level="WARNING")
    from jobs.cli import demo as demonstration

    return demonstration.run(config, devices=devices)
