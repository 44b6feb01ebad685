"""One Celery process per device and one publisher per host: starts, watches and stops them.

Never loads torch: each render process sees its own device only, and only from its start.
"""

import functools
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from urllib.parse import quote

import structlog
from sqlalchemy.exc import DBAPIError

from jobs import (
    beat,
    broker,
    database,
    errors,
    first_answer,
    health,
    lifecycle,
    presets,
    programs,
    queues,
    servers,
    settings,
    states,
    store_mark,
    stores,
    supervisor,
    workers,
)
from worker import credentials, finished, gpus, model_folders, trial
from worker import settings as worker_settings

log = structlog.get_logger()

BOTH_CHECKS = "RUSHES_PROMPT_CHECK or RUSHES_FRAME_CHECK"
CHECKS_SECONDS = 300.0  # to load the user's checks: torch from a cold disk takes a minute
LOOK_SECONDS = 0.5
PUBLISHER_GRACE_SECONDS = 5.0  # what is not uploaded by then is taken up at the next start
PUBLISHER_THREADS = 4
MODELS_SECONDS = 60.0  # between looks for more of them


@dataclass
class RenderProcess:
    """A device, the process on it, and its name in the database."""

    slot: gpus.Slot
    name: str
    child: supervisor.Child
    steered: set[str] = field(default_factory=set)
    """Queues that its Celery has to be told of: it was told to leave them, or began before them."""
    test: trial.Trial | None = None
    """The self-test of its device, while the process is away for it."""

    @property
    def is_there(self) -> bool:
        return self.child.is_alive or self.test is not None

    def begin(self) -> None:
        """Where it cannot, it is revived at the next look."""
        try:
            self.child.start()
        except OSError as error:
            log.error("process.not_started", name=self.name, error=str(error))

    def begin_test(self) -> None:
        """Its process ends: the device is all the test's, and afterwards a fresh one begins."""
        self.child.kill()
        self.test = trial.Trial(self.child.environment)

    def end(self) -> None:
        self.child.kill()
        if self.test is not None:
            self.test.end()


@dataclass
class Launcher:
    """All processes of one host."""

    config: settings.Settings
    db: database.Database
    bell: broker.Broker
    queues: tuple[str, ...]
    renderers: list[RenderProcess]
    publisher: supervisor.Child
    newcomers: model_folders.Newcomers | None
    """None for simulated devices, which render no model."""
    found_queues: frozenset[str] = frozenset()
    """Of models that came after we began."""
    other_store: str | None = None
    """Why the store of our settings is not that of the farm."""
    lost_name: workers.NameTaken | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until told to stop; then drain. NameTaken: another launcher has these names."""
        if not self._take_names():
            return
        try:
            self.publisher.start()
            for renderer in self.renderers:
                renderer.child.start()
            self._watch()
        finally:
            self._drain()
        if self.lost_name is not None:
            raise self.lost_name

    def _take_names(self) -> bool:
        """Once nobody else beats under them: one that died has them for ALIVE_SECONDS yet.

        Two launchers of one name would take each other for dead. False: told to stop meanwhile.
        """
        first: workers.Held | None = None
        while not self.stop.is_set():
            self.sign.touch()
            try:
                held = self.db.write(workers.take_names, [self._claimed(r) for r in self.renderers])
            except DBAPIError as error:
                log.warning("launcher.beat_missed", error=str(error)[:300])
            else:
                if held is None:
                    return True
                if first is None or held.name != first.name:
                    first = held
                    log.warning("launcher.waits", worker=held.name, launcher=held.launcher)
                elif held.seen_at > first.seen_at:
                    raise workers.NameTaken(held.name, held.launcher)
            self.stop.wait(LOOK_SECONDS)
        return False

    @functools.cached_property
    def sign(self) -> beat.Beat:
        return beat.of_launcher(self.config)

    @functools.cached_property
    def identity(self) -> str:
        """Equal only for launchers of one home on one machine, whose locks keep them apart."""
        self.config.home.mkdir(parents=True, exist_ok=True)
        status = self.config.home.stat()
        # A container may have the path, and even the name, of another one, but not its disk too.
        disk = f"{status.st_dev:x}.{status.st_ino:x}"
        return f"{self.config.home} on {socket.gethostname()}, {disk}"

    def _claimed(self, renderer: RenderProcess) -> workers.Registration:
        """Before its process is there."""
        return self._registration(renderer, pid=os.getpid())

    def _watch(self) -> None:
        next_beat = 0.0
        if self.newcomers is not None:
            look = functools.partial(self._look_for_models, self.newcomers)
            threading.Thread(target=look, name="models", daemon=True).start()
        threading.Thread(target=self._look_at_store, name="store", daemon=True).start()
        while not self.stop.wait(LOOK_SECONDS):
            self.publisher.revive()
            for renderer in self.renderers:
                self.sign.touch()  # each may have to wait for a database that is away
                if renderer.test is not None:
                    self._look_at_test(renderer, renderer.test)
                elif renderer.child.revive():
                    self._give_up_what_it_held(renderer)
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + workers.BEAT_SECONDS

    def _beat(self) -> None:
        try:
            for renderer in self.renderers:
                if renderer.is_there:
                    self._renew(renderer)
            finished.find_unfinished(self.db, self.bell, self.config)
            if finished.requeue_vanished(self.db, self.config, launcher=self.identity):
                self.bell.kick()
            self._take_found_queues()
            for renderer in self.renderers:
                self._refuse_all(renderer)
                self._steer(renderer)
                self._test_if_due(renderer)
        except (DBAPIError, broker.BrokerUnavailable, OSError) as error:
            # Also a scratch disk that cannot be read: the render processes refuse jobs for it.
            log.warning("launcher.beat_missed", error=str(error)[:300])

    def _renew(self, renderer: RenderProcess) -> None:
        # Without a process while it is tested, where it had died before: that pid is ours.
        pid = renderer.child.pid if renderer.child.is_alive else os.getpid()
        registration = self._registration(renderer, pid=pid)
        if not self.db.write(workers.register, registration):
            # We were silent for long, and somebody else has begun in our place.
            self.lost_name = workers.NameTaken(renderer.name, None)
            log.critical("launcher.name_lost", worker=renderer.name)
            self.hurry.set()
            self.stop.set()

    def _look_for_models(self, newcomers: model_folders.Newcomers) -> None:
        """Their disk may be mounted after we began. In a thread of its own: it may hang."""
        while not self.stop.wait(MODELS_SECONDS if self.queues else workers.BEAT_SECONDS):
            try:
                found = newcomers.look(known={*self.queues, *self.found_queues})
            except Exception as error:  # one that meets a defect must not end the looks
                is_defect = not isinstance(error, OSError)
                log.warning(
                    "launcher.models_unreadable", error=str(error)[:300], exc_info=is_defect
                )
            else:
                self.found_queues |= set(found)

    def _look_at_store(self) -> None:
        """In a thread of its own: it may hang."""
        guard = store_mark.Guard(self.db, stores.open_store(self.config))
        while not self.stop.is_set():
            try:
                guard.require()
            except store_mark.OtherStore as error:
                if self.other_store is None:
                    log.error("launcher.other_store", error=str(error))
                self.other_store = str(error)
            except (DBAPIError, errors.RushesError, OSError):
                pass  # told by those who need it
            else:
                self.other_store = None
            self.stop.wait(workers.BEAT_SECONDS)

    def _refuse_all(self, renderer: RenderProcess) -> None:
        """In another store nobody would find what it renders."""
        if self.other_store is not None:
            self.db.write(
                workers.refuse,
                renderer.name,
                queue=workers.ALL_QUEUES,
                kind=states.FailureKind.STORAGE,
                reason=self.other_store,
            )

    def _take_found_queues(self) -> None:
        """Told to Celery with the others that it is steered to, at each beat."""
        new = self.found_queues.difference(self.queues)
        if not new:
            return
        self.queues = tuple(sorted({*self.queues, *new}))
        log.info("launcher.models_found", queues=sorted(new))
        for renderer in self.renderers:
            renderer.child.command = _render_command(renderer.name, self.queues)
            renderer.steered |= new

    def _steer(self, renderer: RenderProcess) -> None:
        """Off the queues that it takes nothing of now, and back: else it would eat messages."""
        with self.db.reading() as session:
            refused = {held.queue for held in workers.refusals(session, worker=renderer.name)}
        leaves = set(self.queues) if workers.ALL_QUEUES in refused else refused & set(self.queues)
        renderer.steered |= leaves
        # Said again at each beat: Celery forgets it when it starts anew, and may not have heard.
        takes = sorted(renderer.steered - leaves)
        self.bell.steer(renderer.name, leave=sorted(leaves), take=takes)

    def _test_if_due(self, renderer: RenderProcess) -> None:
        with self.db.reading() as session:
            is_due = health.is_due_for_test(session, renderer.name)
        if not is_due or renderer.test is not None:
            return
        log.warning("selftest.started", worker=renderer.name)
        try:
            renderer.begin_test()
        except OSError as error:
            log.error("process.not_started", name=renderer.name, error=str(error))

    def _look_at_test(self, renderer: RenderProcess, running: trial.Trial) -> None:
        verdict = running.verdict()
        if verdict is None:
            return
        renderer.test = None
        facts = {"worker": renderer.name, "seconds": round(verdict.seconds, 1), **verdict.facts}
        if verdict.failure is None:
            log.info("selftest.passed", **facts)
        else:
            log.error("selftest.failed", **facts, error=verdict.failure)
        try:
            self.db.write(health.tested, renderer.name, failure=verdict.failure)
        except DBAPIError as error:
            # It still needs one, and is tested again.
            log.warning("launcher.not_told", worker=renderer.name, error=str(error)[:300])
        renderer.begin()
        self.bell.kick()

    def _registration(self, renderer: RenderProcess, *, pid: int) -> workers.Registration:
        return workers.Registration(
            name=renderer.name,
            host=self.config.host_name,
            device=renderer.slot.device,
            memory_bytes=renderer.slot.memory_bytes,
            queues=self.queues,
            version=importlib.metadata.version("rushes"),
            pid=pid,
            restarts=renderer.child.restarts,
            launcher=self.identity,
        )

    def _give_up_what_it_held(self, renderer: RenderProcess) -> None:
        try:
            finished.end_lost(self.db, self.config, renderer.name)
        except DBAPIError as error:
            # The lease ends by itself, somewhat later.
            log.warning("launcher.not_told", worker=renderer.name, error=str(error)[:300])

    def _drain(self) -> None:
        """Let each finish its job within the grace time; what it cannot finish goes back free."""
        log.info("launcher.draining", grace_seconds=self.config.grace_seconds)
        deadline = time.monotonic() + self.config.grace_seconds
        for renderer in self.renderers:
            renderer.child.send(signal.SIGTERM)
        self._leave_register()
        while time.monotonic() < deadline and not self.hurry.is_set():
            self.sign.touch()
            if not any(renderer.child.is_alive for renderer in self.renderers):
                break
            self.hurry.wait(LOOK_SECONDS)
        for renderer in self.renderers:
            renderer.end()
        if self.lost_name is None:
            self._release()
        self.publisher.send(signal.SIGTERM)
        if not self.publisher.wait(PUBLISHER_GRACE_SECONDS if not self.hurry.is_set() else 1.0):
            self.publisher.kill()

    def _leave_register(self) -> None:
        """From now on the dispatcher sends nothing more for these workers."""
        names = [renderer.name for renderer in self.renderers]
        try:
            self.db.write(workers.stopped, names, launcher=self.identity)
        except DBAPIError as error:
            log.warning("launcher.not_told", workers=names, error=str(error)[:300])

    def _release(self) -> None:
        for renderer in self.renderers:
            self.sign.touch()
            try:
                released = self.db.write(
                    lifecycle.release_worker, renderer.name, reason="its worker was stopped"
                )
            except DBAPIError as error:
                log.warning("launcher.not_told", worker=renderer.name, error=str(error)[:300])
                # Each of the others would wait as long, and somebody waits for us to end.
                break
            else:
                log.info("worker.stopped", worker=renderer.name, released=released)
        self.bell.kick()


def run(config: settings.Settings, *, devices: str = "auto") -> int:
    """`rushes worker`: until SIGTERM or SIGINT; the second one ends it without grace."""
    launcher = make(config, devices=devices)

    def on_signal(_number: int, _frame: object) -> None:
        if launcher.stop.is_set():
            launcher.hurry.set()
        launcher.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    with _each_only_once(launcher):
        launcher.db.require_file()
        launcher.bell.refuse_wrong_kind()
        first_answer.wait(launcher.db, stop=launcher.stop, alive=launcher.sign.touch)
        names = [renderer.name for renderer in launcher.renderers]
        log.info("launcher.started", workers=names, queues=launcher.queues)
        if not launcher.queues:
            log.warning(
                "launcher.no_models",
                models_dir=str(config.models_dir),
                is_there=config.models_dir.is_dir(),
                do="put a model folder there, or set RUSHES_MODELS_DIR and start this again",
            )
        launcher.run()
    return 0


@contextmanager
def _each_only_once(launcher: Launcher) -> Iterator[None]:
    """Two processes of one name would take each other for dead and end each other's attempts."""
    with ExitStack() as stack:
        for renderer in launcher.renderers:
            path = launcher.config.home / "locks" / quote(renderer.name, safe="@")
            refusal = (
                f"{renderer.name} already runs on this machine: stop that `rushes worker` or "
                "`rushes up` first, or give other --devices"
            )
            stack.enter_context(supervisor.only_one(path, refusal))
        yield


def check_settings() -> worker_settings.WorkerSettings:
    """How its workers would render. InvalidInput for values that cannot be used."""
    found = worker_settings.load()
    credentials.load(found)
    if found.frame_check is not None or settings.load().prompt_check is not None:
        _try_checks()
    return found


def _try_checks() -> None:
    """In a process of its own, as a render process is: here, torch must not be loaded."""
    try:
        tied = servers.tied_to_parent(signal.SIGKILL)
        command = [*tied, sys.executable, "-m", "worker.checks"]
        done = programs.run(command, seconds=CHECKS_SECONDS)
    except subprocess.TimeoutExpired:
        message = f"{BOTH_CHECKS}: not loaded within {CHECKS_SECONDS:.0f} s"
    else:
        if done.returncode == 0:
            return
        said = done.stderr.splitlines() if done.returncode == 1 else []
        ended = f"{BOTH_CHECKS}: what loads them ended with status {done.returncode}"
        message = said[-1] if said else ended
    raise errors.InvalidInput("settings", [errors.Problem(line=None, message=message)])


def make(config: settings.Settings, *, devices: str) -> Launcher:
    stores.open_store(config)  # a bad URL is told now, and not after the first render
    check_settings()  # nor a bad value by children that cannot begin
    slots = gpus.slots(devices, cores=_cores())
    host = config.host_name
    is_simulation = all(slot.device == gpus.SIMULATED for slot in slots)
    names = simulated_queues(config) if is_simulation else sorted(model_folders.find(config))
    renderers = []
    for slot in slots:
        name = f"{slot.short_name}@{host}"
        environment = {**slot.environment, "RUSHES_WORKER_NAME": name}
        child = supervisor.Child(
            name=name,
            command=_render_command(name, names),
            environment=environment,
            # The next launcher starts a process on the same device.
            ends_with_us_by=signal.SIGKILL,
        )
        renderers.append(RenderProcess(slot=slot, name=name, child=child))
    publisher = supervisor.Child(
        name=f"publish@{host}",
        command=[
            *_celery(f"publish@{host}", broker.publish_queue(host)),
            "--pool=threads",
            f"--concurrency={PUBLISHER_THREADS}",
        ],
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    return Launcher(
        config=config,
        db=database.connect_service(config),
        bell=broker.Broker(config),
        queues=tuple(names),
        renderers=renderers,
        publisher=publisher,
        newcomers=None if is_simulation else model_folders.Newcomers(config),
    )


def simulated_queues(config: settings.Settings) -> list[str]:
    """Of models that stand for others in a rehearsal; never that of a real one."""
    paths = {queues.SIMULATED} | {
        preset.look.model_path
        for preset in presets.available(config.presets_dir)
        if isinstance(preset, presets.Preset) and queues.is_simulated(preset.look.model_path)
    }
    return sorted({queues.of_model(path) for path in paths})


def _cores() -> int:
    """Those that this process may use: a container or taskset may leave it fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _render_command(name: str, names: Sequence[str]) -> Sequence[str]:
    # A queue that nobody sends to keeps Celery from its default queue.
    taken = ",".join(names or ("rushes.render.nothing",))
    return [*_celery(name, taken), "--pool=prefork", "--concurrency=1"]


def _celery(name: str, taken: str) -> Sequence[str]:
    return [
        # Celery's own lines are many and say little; ours have an event name each.
        *(sys.executable, "-m", "celery", "--quiet", "--app", "worker.tasks", "worker"),
        "--loglevel=WARNING",
        *("--hostname", name, "--queues", taken),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]
