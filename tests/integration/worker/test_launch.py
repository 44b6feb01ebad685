"""The launcher's processes: how they are started, kept, drained and never doubled."""

import base64
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import kombu
import psutil
import pytest
from celery import Celery
from sqlalchemy.exc import DBAPIError, OperationalError

from jobs import (
    beat,
    broker,
    celery_app,
    database,
    errors,
    health,
    lifecycle,
    queries,
    queues,
    servers,
    settings,
    states,
    store_mark,
    stores,
    supervisor,
    workers,
)
from tests.waiting import until
from worker import copies, finished, gpus, launch, model_folders, redis_transport, trial

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
DEAF = [
    *(sys.executable, "-S", "-c"),
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    "; time.sleep(600)",
]


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def launcher(host, tmp_path):
    """`launcher(command)`: a host whose one renderer and publisher are trivial processes."""

    def make(command=SLEEP, **changes):
        slot = gpus.Slot(short_name="cpu0", device="CPU", memory_bytes=None, environment={})
        child = supervisor.Child(name="cpu0@here", command=command, log_path=tmp_path / "child.log")
        config = host.config.model_copy(update=changes)
        return launch.Launcher(
            config=config,
            db=host.db,
            bell=host.bell,
            queues=("rushes.render.tiny",),
            renderers=[launch.RenderProcess(slot=slot, name="cpu0@here", child=child)],
            publisher=supervisor.Child(name="publish@here", command=SLEEP),
            newcomers=model_folders.Newcomers(config),
        )

    return make


@pytest.fixture
def running(monkeypatch):
    """Runs a launcher in a thread; it has drained when the test ends."""
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.02)
    started = []

    def start(made):
        thread = threading.Thread(target=made.run)
        thread.start()
        started.append((made, thread))
        until(lambda: made.renderers[0].child.is_alive)
        return thread

    yield start
    for made, thread in started:
        made.stop.set()
        made.hurry.set()
        thread.join(60)
        assert not thread.is_alive()
        assert not made.renderers[0].child.is_alive
        assert not made.publisher.is_alive


def registered(host):
    with host.db.reading() as session:
        return {live.worker.name: live.worker for live in queries.live_workers(session)}


def test_a_running_worker_is_in_the_register(host, launcher, running):
    made = launcher()
    running(made)
    until(lambda: registered(host)["cpu0@here"].pid == made.renderers[0].child.pid)
    row = registered(host)["cpu0@here"]
    assert (row.host, row.device, row.queues) == ("here", "CPU", ["rushes.render.tiny"])


def test_a_dead_worker_comes_back_and_its_job_goes_back_at_once(host, launcher, running):
    job = host.submit()[0]
    made = launcher()
    running(made)
    host.claim(job)
    made.renderers[0].child.send(signal.SIGKILL)
    until(lambda: host.job(job.id).state is states.JobState.QUEUED)
    assert host.attempts(job.id)[0].state is states.AttemptState.LOST
    until(lambda: made.renderers[0].child.restarts == 1 and made.renderers[0].child.is_alive)


def test_what_a_dead_worker_has_finished_is_kept(host, launcher):
    folder = host.finished()
    made = launcher()
    made._give_up_what_it_held(made.renderers[0])
    assert host.attempt(folder).state is states.AttemptState.RENDERED


def test_a_dead_publisher_comes_back(launcher, running):
    made = launcher()
    running(made)
    until(lambda: made.publisher.is_alive)
    made.publisher.send(signal.SIGKILL)
    until(lambda: made.publisher.restarts == 1 and made.publisher.is_alive)


def test_a_publisher_that_does_not_end_is_killed(launcher, running, tmp_path):
    log = tmp_path / "publisher.log"
    made = launcher()
    made.publisher = supervisor.Child(name="publish@here", command=DEAF, log_path=log)
    thread = running(made)
    until(lambda: log.exists() and "deaf" in log.read_text())
    made.stop.set()
    made.hurry.set()
    thread.join(60)
    assert not made.publisher.is_alive


def test_a_worker_without_a_process_is_silent(host, launcher):
    """One that cannot start is no live worker, though its launcher is there."""
    made = launcher()
    assert made._take_names()
    seen_at = registered(host)["cpu0@here"].heartbeat_at
    made._beat()
    assert registered(host)["cpu0@here"].heartbeat_at == seen_at
    made.renderers[0].child.start()
    made._beat()
    assert registered(host)["cpu0@here"].heartbeat_at > seen_at
    made.renderers[0].end()


def test_a_stop_gives_back_what_is_held_at_no_cost(host, launcher, running):
    job = host.submit()[0]
    made = launcher()
    thread = running(made)
    host.claim(job)
    made.stop.set()
    thread.join(60)
    released = host.job(job.id)
    assert (released.state, released.error_count, released.crash_count) == ("queued", 0, 0)
    assert host.attempts(job.id)[0].state is states.AttemptState.RELEASED
    assert registered(host) == {}


def test_a_worker_that_does_not_end_in_its_grace_is_killed(host, launcher, running, tmp_path):
    job = host.submit()[0]
    made = launcher(DEAF, grace_seconds=0.0)
    thread = running(made)
    until(lambda: "deaf" in (tmp_path / "child.log").read_text())
    host.claim(job)
    made.stop.set()
    thread.join(60)
    assert host.attempts(job.id)[0].state is states.AttemptState.RELEASED


def test_a_second_signal_ends_the_grace(host, launcher, running, tmp_path):
    made = launcher(DEAF, grace_seconds=3_600.0)
    thread = running(made)
    until(lambda: "deaf" in (tmp_path / "child.log").read_text())
    made.stop.set()
    until(lambda: registered(host) == {})
    made.hurry.set()
    thread.join(60)
    assert not thread.is_alive()


def test_an_outage_of_the_database_ends_no_process(host, launcher, running, capsys):
    made = launcher()
    running(made)
    until(lambda: "cpu0@here" in registered(host))
    pid = made.renderers[0].child.pid
    with host.database_outage():
        with contextlib.suppress(DBAPIError):  # what the beat of the other thread catches
            made._renew(made.renderers[0])
        made._beat()
        assert "launcher.beat_missed" in capsys.readouterr().out
        assert made.renderers[0].child.pid == pid
    made._beat()
    assert registered(host)["cpu0@here"].pid == pid


def test_a_process_that_dies_in_an_outage_comes_back(host, launcher, running):
    made = launcher()
    running(made)
    until(lambda: "cpu0@here" in registered(host))
    with host.database_outage():
        made.renderers[0].child.send(signal.SIGKILL)
        until(lambda: made.renderers[0].child.restarts == 1)


def test_an_outage_in_which_a_name_is_taken_is_waited_out(host, launcher, monkeypatch):
    made, write = launcher(), host.db.write

    def away(*_, **__):
        monkeypatch.setattr(host.db, "write", write)
        raise OperationalError("UPDATE", {}, Exception("no answer"))

    monkeypatch.setattr(host.db, "write", away)
    assert made._take_names()


def test_what_lies_on_the_disk_at_the_start_is_announced(host, launcher, running):
    folder = host.finished()
    running(launcher())
    until(lambda: host.waiting_publishes() == [folder.attempt_id])


def test_a_damaged_folder_does_not_end_the_launcher(host, launcher, running):
    folder = host.finished()
    folder.sidecar.write_text("{")
    made = launcher()
    running(made)
    until(lambda: not folder.path.exists())
    until(lambda: "cpu0@here" in registered(host))


def test_each_device_has_its_command_and_environment(host):
    made = launch.make(host.config, devices="cpu:2")
    first, second = made.renderers
    assert [one.name for one in made.renderers] == ["cpu0@here", "cpu1@here"]
    command = list(first.child.command)
    assert command[:3] == [sys.executable, "-m", "celery"]
    assert command[command.index("--hostname") + 1] == "cpu0@here"
    assert command[command.index("--queues") + 1] == queues.of_model("tiny")
    assert {"--pool=prefork", "--concurrency=1"} <= set(command)
    environment = second.child.environment
    assert environment["RUSHES_WORKER_NAME"] == "cpu1@here"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_publisher_takes_this_hosts_queue_and_sees_no_gpu(host):
    publisher = launch.make(host.config, devices="cpu").publisher
    command = list(publisher.command)
    assert command[command.index("--hostname") + 1] == "publish@here"
    assert command[command.index("--queues") + 1] == broker.publish_queue("here")
    assert "--pool=threads" in command
    assert publisher.environment == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_worker_without_models_takes_no_queue_of_a_model(host, monkeypatch, tmp_path):
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "none"))
    made = launch.make(settings.load(), devices="cpu")
    assert made.queues == ()
    command = list(made.renderers[0].child.command)
    assert command[command.index("--queues") + 1] == "rushes.render.nothing"


@pytest.mark.parametrize("first", [(), ("rushes.render.first",)])
def test_models_that_come_later_are_taken_without_a_restart(
    host, launcher, running, monkeypatch, tmp_path, first
):
    """As from a disk that is mounted later than the launcher began, or by a copy beside others."""
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(launch, "MODELS_SECONDS", 0.05)
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    monkeypatch.setattr(launch, "_render_command", lambda _name, names: [*SLEEP, *names])
    told = []
    monkeypatch.setattr(broker.Broker, "steer", lambda _bell, name, **given: told.append(given))
    models = tmp_path / "mounted"
    made = launcher(models_dir=models)
    made.queues = first
    child = made.renderers[0].child
    running(made)
    until(lambda: registered(host)["cpu0@here"].pid == child.pid)
    pid = child.pid
    assert registered(host)["cpu0@here"].queues == list(first)
    (models / "tiny").mkdir(parents=True)
    (models / "tiny" / "config.json").write_text("{}")
    wanted = [*first, "rushes.render.tiny"]
    until(lambda: registered(host)["cpu0@here"].queues == wanted)
    until(lambda: told[-1] == {"leave": [], "take": ["rushes.render.tiny"]})
    assert child.pid == pid
    assert child.command[-len(wanted) :] == wanted
    child.send(signal.SIGKILL)
    until(lambda: child.restarts == 1 and child.is_alive)
    assert psutil.Process(child.pid).cmdline()[-len(wanted) :] == wanted


def test_a_host_with_another_store_than_the_farms_takes_nothing(
    host, launcher, running, monkeypatch, tmp_path
):
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    store_mark.Guard(host.db, stores.open_store(host.config)).leave()
    (tmp_path / "elsewhere").mkdir()
    running(launcher(results_url=(tmp_path / "elsewhere").as_uri()))

    def refused():
        with host.db.reading() as session:
            return workers.refusals(session, worker="cpu0@here")

    until(refused)
    (refusal,) = refused()
    assert (refusal.queue, refusal.kind) == (workers.ALL_QUEUES, states.FailureKind.STORAGE)
    assert "RUSHES_RESULTS_URL" in refusal.reason


def test_a_host_with_the_store_of_the_farm_refuses_nothing(host, launcher, running, monkeypatch):
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    store_mark.Guard(host.db, stores.open_store(host.config)).leave()
    looked, require = threading.Event(), store_mark.Guard.require

    def told(guard):
        require(guard)
        looked.set()

    monkeypatch.setattr(store_mark.Guard, "require", told)
    made = launcher()
    running(made)
    assert looked.wait(20)
    assert made.other_store is None


def test_a_disk_of_models_that_cannot_be_read_holds_up_no_beat(
    host, launcher, running, monkeypatch
):
    def stale(_config):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(model_folders, "find", stale)
    made = launcher()
    made.queues = ()
    thread = running(made)
    until(lambda: registered(host)["cpu0@here"].pid == made.renderers[0].child.pid)
    first = registered(host)["cpu0@here"].heartbeat_at
    until(lambda: registered(host)["cpu0@here"].heartbeat_at > first)
    assert thread.is_alive()


@pytest.mark.parametrize("trouble", [OSError(errno.ESTALE, "stale"), KeyError("a defect")])
def test_a_look_for_models_that_fails_is_not_the_last(
    host, launcher, running, monkeypatch, tmp_path, trouble
):
    real, troubles = model_folders.find, [trouble]

    def find(config):
        if troubles:
            raise troubles.pop()
        return real(config)

    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(launch, "MODELS_SECONDS", 0.05)
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    monkeypatch.setattr(model_folders, "find", find)
    made = launcher(models_dir=tmp_path / "models")
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "models" / "new" / "config.json").write_text("{}")
    running(made)
    until(lambda: "rushes.render.new" in made.queues)


def test_a_disk_of_models_that_hangs_holds_up_neither_beats_nor_a_stop(
    host, launcher, running, monkeypatch
):
    answered, asked = threading.Event(), threading.Event()

    def hang(_config):
        asked.set()
        answered.wait()
        return {}

    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(model_folders, "find", hang)
    made = launcher()
    made.queues = ()
    thread = running(made)
    try:
        assert asked.wait(30)
        first = registered(host)["cpu0@here"].heartbeat_at
        until(lambda: registered(host)["cpu0@here"].heartbeat_at > first)
        made.stop.set()
        thread.join(30)
        assert not thread.is_alive()
    finally:
        answered.set()


def test_a_bad_results_url_is_told_before_anything_starts(host, monkeypatch):
    monkeypatch.setenv("RUSHES_RESULTS_URL", "ftp://example/videos")
    with pytest.raises(errors.InvalidInput, match="RUSHES_RESULTS_URL"):
        launch.make(settings.load(), devices="cpu")


def test_a_second_worker_of_the_same_name_is_refused(host):
    made = launch.make(host.config, devices="cpu:2")
    other = launch.make(host.config, devices="cpu")
    with (
        launch._each_only_once(made),
        pytest.raises(supervisor.AlreadyRunning, match="cpu0@here already runs on this machine"),
        launch._each_only_once(other),
    ):
        pass
    with launch._each_only_once(other):
        pass


@pytest.fixture
def another(host, launcher, tmp_path):
    """A launcher of the same host name with a home, and so with locks, of its own."""
    return launcher(home=tmp_path / "another")


def test_a_second_launcher_of_a_name_is_refused_whatever_its_home(
    host, launcher, running, another, monkeypatch
):
    """Each would take the other's attempts for those of a dead worker."""
    made = launcher()
    running(made)
    job = host.submit()[0]
    host.claim(job)
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.05)
    with pytest.raises(workers.NameTaken, match=r"cpu0@here is run by another .*RUSHES_HOST"):
        another.run()
    assert not another.renderers[0].child.is_alive
    assert host.job(job.id).state is states.JobState.RUNNING
    assert registered(host)["cpu0@here"].launcher == made.identity


def test_the_name_of_a_launcher_that_died_is_taken_over_when_it_is_stale(
    host, launcher, running, another, monkeypatch
):
    dead = launcher()
    assert dead._take_names()
    monkeypatch.setattr(workers, "ALIVE_SECONDS", 1.0)
    began = time.monotonic()
    running(another)
    assert time.monotonic() - began > 0.5
    until(lambda: registered(host)["cpu0@here"].launcher == another.identity)


def given_back(host, claim):
    assert host.db.write(lifecycle.release, claim.attempt_id, reason="drained")


def rendered(host, claim):
    """Its video may wait for the store for days."""
    facts = {"seconds": {}, "peak_memory_bytes": None, "lease_seconds": 3600.0}
    assert host.db.write(lifecycle.rendered, claim.attempt_id, **facts)


def silent(host, claim):
    assert host.db.write(lifecycle.heartbeat, claim.attempt_id, lease_seconds=-1.0)


@pytest.mark.parametrize("end", [given_back, rendered, silent])
def test_the_name_of_a_launcher_that_drains_is_free_when_its_job_has_ended(
    host, launcher, another, monkeypatch, end
):
    """Who begins under that name gives up what its worker holds."""
    draining = launcher()
    assert draining._take_names()
    claim = host.claim(host.submit()[0])
    draining._leave_register()
    monkeypatch.setattr(workers, "ALIVE_SECONDS", 0.0)  # it beats no more
    take = [another._claimed(renderer) for renderer in another.renderers]
    held = host.db.write(workers.take_names, take)
    assert held.launcher == draining.identity
    end(host, claim)
    assert host.db.write(workers.take_names, take) is None


def test_a_scratch_disk_that_cannot_be_read_does_not_end_the_launcher(host, launcher, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    made = launcher()
    assert made._take_names()
    monkeypatch.setattr(finished, "find_unfinished", broken)
    made._beat()


def test_a_database_that_hangs_holds_up_a_stop_no_longer_for_more_devices(launcher, monkeypatch):
    """Render processes hear of it first, and each call that gets no answer is made once."""
    made, happened = launcher(), []
    made.renderers *= 3

    def hang(_db, change, *_, **__):
        happened.append(change.__name__)
        raise OperationalError(change.__name__, None, Exception("no answer within 17 s"))

    monkeypatch.setattr(database.Database, "write", hang)
    monkeypatch.setattr(supervisor.Child, "send", lambda _, number: happened.append(number))
    made._drain()
    asked = ["stopped", "release_worker"]
    assert happened == [*[signal.SIGTERM] * 3, *asked, signal.SIGTERM]


def test_the_same_home_takes_its_names_back_at_once(host, launcher):
    """Its locks say that the one before has ended."""
    assert launcher()._take_names()
    assert launcher()._take_names()


def test_a_launcher_that_was_taken_over_ends_and_leaves_its_successor_alone(
    host, launcher, another, monkeypatch
):
    """After a long sleep of its machine, say."""
    made = launcher()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(made.run)
        until(lambda: made.renderers[0].child.is_alive)
        monkeypatch.setattr(workers, "ALIVE_SECONDS", -1.0)
        assert another._take_names()
        monkeypatch.undo()
        job = host.submit()[0]
        host.claim(job)
        made._beat()
        assert isinstance(run.exception(60), workers.NameTaken)
    assert not made.renderers[0].child.is_alive
    assert host.job(job.id).state is states.JobState.RUNNING
    assert registered(host)["cpu0@here"].launcher == another.identity


def test_it_gives_a_sign_of_life_also_while_the_database_is_away(host, launcher, running):
    """Whoever starts it again for that ends renders, and ends no outage."""
    sign = beat.of_launcher(host.config)
    assert not sign.is_alive()
    made = launcher()
    running(made)
    with host.database_outage():
        for _ in range(2):
            until(sign.is_alive)
            os.utime(sign.path, (0, 0))


def test_a_self_test_has_the_device_to_itself_and_ends_with_the_launcher(
    host, launcher, running, monkeypatch
):
    monkeypatch.setattr(trial, "COMMAND", SLEEP)
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.1)
    made = launcher()
    running(made)
    host.db.write(health.ask_for_test, "cpu0@here")
    renderer = made.renderers[0]
    until(lambda: renderer.test is not None)
    process = renderer.test._process
    assert not renderer.child.is_alive
    seen_at = registered(host)["cpu0@here"].heartbeat_at
    until(lambda: registered(host)["cpu0@here"].heartbeat_at > seen_at)  # it is no silent worker
    made.stop.set()
    until(lambda: process.poll() is not None)


def test_a_process_that_had_died_before_its_self_test_ends_nobody_else(host, launcher, monkeypatch):
    """A driver that is gone: the process cannot start, and its worker is taken out for that."""
    monkeypatch.setattr(trial, "COMMAND", SLEEP)
    made = launcher()
    renderer = made.renderers[0]
    renderer.child.start()
    made._beat()
    renderer.child.kill()
    assert renderer.child.revive(), "its end is noticed, and it pauses"
    host.db.write(health.ask_for_test, "cpu0@here")
    made._beat()
    assert renderer.test is not None
    seen_at = registered(host)["cpu0@here"].heartbeat_at
    until(lambda: made._beat() or registered(host)["cpu0@here"].heartbeat_at > seen_at)
    assert registered(host)["cpu0@here"].pid == os.getpid()
    renderer.end()


def test_after_a_good_self_test_a_fresh_process_renders(host, launcher, running, monkeypatch):
    verdict = """print('{"failure": null, "facts": {}}')"""
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-S", "-c", verdict))
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.1)
    made = launcher()
    running(made)
    before = made.renderers[0].child.pid
    host.db.write(health.ask_for_test, "cpu0@here")
    until(lambda: registered(host)["cpu0@here"].tested_at is not None)
    until(lambda: made.renderers[0].child.is_alive)
    assert made.renderers[0].child.pid != before
    with host.db.reading() as session:
        assert workers.refusals(session) == []


def test_a_self_test_that_ends_in_an_outage_ends_nobody_else(host, launcher, monkeypatch):
    """Nor if no process can be started in that moment: it comes at a later look."""
    verdict = """print('{"failure": null, "facts": {}}')"""
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-S", "-c", verdict))
    made = launcher()
    (renderer,) = made.renderers
    renderer.child.start()
    renderer.begin_test()

    def full(_child):
        raise BlockingIOError("no more processes")

    with host.database_outage(), monkeypatch.context() as patched:
        patched.setattr(supervisor.Child, "start", full)
        while renderer.test is not None:
            made._look_at_test(renderer, renderer.test)
    until(lambda: not renderer.child.revive() and renderer.child.is_alive)
    renderer.end()


@contextlib.contextmanager
def launched(host, devices):
    """`rushes worker` itself, with Celery."""
    command = [sys.executable, "-m", "jobs", "worker", "--devices", devices]
    command = [*servers.tied_to_parent(), *command]
    with (host.config.home / "worker.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    family = []
    try:
        until(lambda: registered(host), seconds=60)
        # Two Celery parents, and below one of them the process that renders.
        until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 3, seconds=60)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process, family
    finally:
        for one in (process, *family):
            if one.pid and psutil.pid_exists(one.pid):
                one.kill()
        process.wait()


@pytest.fixture
def real_launcher(host):
    with launched(host, "cpu") as started:
        yield started


def test_a_stop_lets_the_tail_of_a_job_end(host, monkeypatch):
    """Celery has long heard that the task is over, and would end the process at once."""
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "0.01")
    monkeypatch.setenv("RUSHES_SIM_ENCODES", "true")
    monkeypatch.setenv("RUSHES_X264_PRESET", "veryslow")  # seconds of tail
    large = {"target_width": 832, "target_height": 480, "target_video_length": 33}
    (job,) = host.submit(model_path="simulated", **large)
    with launched(host, "sim:1") as (process, _):
        host.bell.send_renders(job.queue, [job.id])
        (attempt,) = until(lambda: [a for a in host.attempts(job.id) if a.stage == "mux"])
        assert attempt.state is states.AttemptState.RUNNING
        process.terminate()
        process.wait(60)
    (attempt,) = host.attempts(job.id)
    assert attempt.state in (states.AttemptState.RENDERED, states.AttemptState.SUCCEEDED)


def test_a_worker_takes_no_message_before_its_device_is_free(host, monkeypatch):
    """It would wait for this one while another worker has nothing to do."""
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "5")
    jobs = host.submit(3, model_path="simulated")
    with launched(host, "sim:1"):
        host.bell.send_renders(jobs[0].queue, [job.id for job in jobs])
        until(lambda: host.attempts(jobs[0].id), seconds=60)
        time.sleep(2.0)
        assert host.bell.waiting(jobs[0].queue) == {job.id for job in jobs[1:]}


def test_what_a_child_of_celery_held_is_given_up_by_the_one_that_comes_after_it(host, monkeypatch):
    """Its parent lives, so the launcher hears nothing; and no lease ends here in time."""
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "60")
    (job,) = host.submit(model_path="simulated")
    with launched(host, "sim:1"):
        host.bell.send_renders(job.queue, [job.id])
        until(lambda: host.attempts(job.id), seconds=60)
        parent = psutil.Process(registered(host)["sim0@here"].pid)
        (child,) = (one for one in parent.children() if "spawn_main" in " ".join(one.cmdline()))
        child.kill()
        until(lambda: host.job(job.id).state is states.JobState.QUEUED, seconds=60)
        assert parent.is_running()
    assert host.attempts(job.id)[0].state is states.AttemptState.LOST


@pytest.fixture
def own_check(tmp_path, monkeypatch):
    """`own_check("check = print")`: the frame check that these lines make."""

    def put(lines):
        (tmp_path / "house").mkdir(exist_ok=True)
        (tmp_path / "house" / "own_check.py").write_text(lines)
        found = [str(tmp_path / "house"), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, found)))
        monkeypatch.setenv("RUSHES_FRAME_CHECK", "own_check:check")

    return put


def test_a_check_that_cannot_be_loaded_keeps_a_launcher_from_starting(host, own_check, monkeypatch):
    """Else its render processes would begin again and again."""
    own_check("check = print")
    assert launch.check_settings().frame_check == "own_check:check"
    for lines, told in {
        "raise OSError('no file of\\nweights')": "OSError: no file of weights",
        "": "has no attribute 'check'",
        "import os; os._exit(3)": "ended with status 3",
        "import time; time.sleep(60)": "not loaded within 3 s",
    }.items():
        own_check(lines)
        if "sleep" in lines:
            monkeypatch.setattr(launch, "CHECKS_SECONDS", 3.0)
        with pytest.raises(errors.InvalidInput, match=f"RUSHES_FRAME_CHECK.*{told}"):
            launch.make(host.config, devices="cpu")
    monkeypatch.delenv("RUSHES_FRAME_CHECK")
    monkeypatch.setattr(launch, "CHECKS_SECONDS", 300.0)
    monkeypatch.setenv("RUSHES_PROMPT_CHECK", "nowhere:check")
    with pytest.raises(errors.InvalidInput, match="RUSHES_PROMPT_CHECK=nowhere:check"):
        launch.make(host.config, devices="cpu")


def test_what_a_check_loads_is_not_loaded_in_the_launcher(own_check):
    own_check("import torch\ncheck = print")
    script = (
        "import sys; from worker import launch; launch.check_settings(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_a_process_that_cannot_render_ends_and_eats_no_messages(host, own_check):
    """Celery would keep it: each job would be taken by it, and sent again, for ever."""
    own_check("import os\nassert os.environ['RUSHES_WORKER_NAME'] == 'cpu0@here'\ncheck = print")
    log = host.config.home / "worker.log"
    with launched(host, "sim:1"):
        until(lambda: "worker.cannot_start" in log.read_text(), seconds=60)
        until(lambda: "process.ended" in log.read_text(), seconds=20)


def consumed(host):
    """Queues that the real render process takes from."""
    found = celery_app.make(host.config).control.inspect(["cpu0@here"], timeout=1).active_queues()
    return {queue["name"] for queue in (found or {}).get("cpu0@here", ())}


def test_another_celery_app_on_the_same_redis_and_a_worker_leave_each_other_alone(host):
    """Its long task is not begun a second time, and its order to end is not for ours."""
    other = Celery("other", broker=host.bell.url, set_as_current=False)
    other.send_task("other.long")
    with other.connection() as connection:
        kombu.Queue("celery")(connection.default_channel).get()
        host.bell.redis.zadd(
            "unacked_index", dict.fromkeys(connection.default_channel.qos._delivered, 1)
        )
        ours = celery_app.make(host.config).control
        with launched(host, "sim:1"):
            until(lambda: ours.ping(["sim0@here"], timeout=1), seconds=60)
            other.control.shutdown()
            assert ours.ping(["sim0@here"], timeout=5)
        assert host.bell.redis.llen("celery") == 0
        assert host.bell.redis.hlen("unacked") == 1


def test_a_worker_needs_no_more_rights_in_redis_than_doctor_names(host, monkeypatch):
    admin = host.bell.redis
    admin.execute_command(*f"ACL SETUSER me on >pw {host.bell.rights}".split())
    admin.acl_log_reset()
    try:
        restricted = f"redis://me:pw@{host.bell.url.rpartition('@')[2]}"
        monkeypatch.setenv("CELERY_BROKER_URL", restricted)
        (job,) = host.submit(model_path="simulated")
        bell = broker.Broker(settings.load())
        with launched(host, "sim:1") as (process, _):
            bell.send_renders(job.queue, [job.id])
            until(lambda: host.job(job.id).state is states.JobState.SUCCEEDED, seconds=60)
            bell.steer("sim0@here", leave=[job.queue])
            process.terminate()
            process.wait(60)
        assert admin.acl_log() == []
    finally:
        admin.acl_deluser("me")


def test_a_worker_leaves_the_queues_that_it_refuses_and_comes_back(host, real_launcher):
    """Else it would eat the messages that others could render."""
    tiny = queues.of_model("tiny")
    until(lambda: consumed(host) == {tiny}, seconds=60)
    kind = states.FailureKind.WEIGHTS
    host.db.write(workers.refuse, "cpu0@here", queue=tiny, kind=kind, reason="gone")
    until(lambda: consumed(host) == set(), seconds=30)
    host.db.write(workers.accept, "cpu0@here", queue=tiny)
    until(lambda: consumed(host) == {tiny}, seconds=30)


def test_a_worker_whose_subscription_breaks_goes_on_consuming(host, real_launcher):
    """As a proxy's time limit does it, or a failover: Redis itself is there all the time."""
    tiny = queues.of_model("tiny")
    until(lambda: consumed(host) == {tiny}, seconds=60)
    assert host.bell.redis.client_kill_filter(_type="pubsub") > 0
    host.bell.send_renders(tiny, [4711])
    until(lambda: host.bell.waiting(tiny) == set(), seconds=60)
    until(lambda: consumed(host) == {tiny}, seconds=60)


def spoiled(message, **changes):
    return json.dumps({**json.loads(message), **changes})


def test_garbage_in_redis_is_dropped_and_ends_no_process(host, real_launcher):
    """Then what follows it is rendered, by the same process."""
    _, family = real_launcher
    tiny = queues.of_model("tiny")
    host.bell.send_renders("elsewhere", [4711])
    (good,) = host.bell.redis.lrange("elsewhere", 0, -1)
    host.bell.redis.delete("elsewhere")
    body = base64.b64encode(b'[["4711"], {}, {}]').decode()
    host.bell.redis.rpush(
        tiny,
        *("nonsense", b"\xff\xfe", "[" * 100_000, "null", "5", '"text"', "[]", "{}"),
        spoiled(good, properties=None),
        spoiled(good, properties={}),
        spoiled(good, headers=[]),
        spoiled(good, headers={"task": [], "id": "x"}),
        spoiled(good, headers={"task": "rushes.other", "id": "x"}),
        spoiled(good, body="%%%"),
        spoiled(good, body=body),
        spoiled(good, **{"content-type": "application/x-python-serialize"}),
    )
    host.bell.redis.rpush(broker.publish_queue("here"), "nonsense", "{}")
    job = host.submit()[0]
    host.bell.send_renders(tiny, [job.id])
    until(lambda: host.job(job.id).state is states.JobState.SUCCEEDED, seconds=90)
    assert host.bell.waiting(tiny) == set()
    assert all(one.is_running() for one in family)
    assert registered(host)["cpu0@here"].restarts == 0
    log = (host.config.home / "worker.log").read_text()
    assert log.count("message.dropped") >= 16
    assert "Traceback" not in log


def test_what_we_send_ourselves_is_ours(host):
    host.bell.send_renders("elsewhere", [4711])
    host.bell.send_publish("here", 4711)
    for queue in ("elsewhere", broker.publish_queue("here")):
        (message,) = host.bell.redis.lrange(queue, 0, -1)
        assert redis_transport.is_ours(json.loads(message))


def test_the_children_of_a_killed_launcher_end(real_launcher):
    process, family = real_launcher
    process.kill()
    process.wait()
    until(lambda: all(is_gone(one) for one in family), seconds=60)
