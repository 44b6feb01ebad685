"""One attempt, from the claim to a finished mp4 on this host's disk."""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from jobs import (
    broker,
    database,
    lifecycle,
    looks,
    reports,
    retries,
    settings,
    states,
    workers,
)
from worker import behind, checks, errors, finished, heartbeat, scratch, tracing
from worker import settings as worker_settings_module

log = structlog.get_logger()

DEVICE_LOST = 71  # exit status, for the logs
LAST_TAIL_SECONDS = 60.0  # for the finished frames of one job when the device fails the next
TAIL_LOOK_SECONDS = 1.0
MOST_AWAITING_HASHES = 8

Left = Callable[[], None]
"""What is left of a render when the device is free; to be called once, in any thread."""


class Renderer(Protocol):
    """What this process's device does: `rendering` with networks, `simulation` without."""

    def render(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Progress,
        *,
        ran_out: str | None = None,
    ) -> Left:
        """All that the device does. What is left leaves a finished video in the folder.

        DeviceOutOfMemory: step down, then try again.
        """

    def step_down(self, look: looks.Look) -> str | None:
        """After running out of memory: place less on the device. In words; None: nothing less."""

    def num_waiting(self) -> int:
        """Of how many videos the mp4 is there and the hashes of their weights are not yet."""

    def hurry(self) -> None:
        """This process ends: what is left of its videos waits for no hash any more."""

    def report(self, *, renders: int) -> reports.Report:
        """What is loaded and how often it changed."""


@dataclass
class Tally:
    """What this process has done since it began."""

    renders: int = 0
    held: set[int] = field(default_factory=set)
    """Attempts that it works on: one on the device, and the tails of those before. Also those
    of which it could not tell that they are rendered."""
    refusals: int = 0


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What one render process holds for as long as it lives."""

    config: settings.Settings
    worker_settings: worker_settings_module.WorkerSettings
    db: database.Database
    bell: broker.Broker
    renderer: Renderer
    safety: checks.Checks = field(default_factory=checks.Checks)
    tally: Tally = field(default_factory=Tally)
    tail: behind.Behind = field(
        default_factory=lambda: behind.Behind("tail", threads=MOST_AWAITING_HASHES + 2)
    )
    """The end of one job, beside the beginning of the next."""

    def run_attempt(self, job_id: int) -> None:
        """Render this job if it may still start. Every way it ends is written to its row.

        Returns when the device is free: the mp4 is finished and handed over by the tail.
        """
        try:
            if self._lacks_room():
                return
            claim = self._claim(job_id)
        except DBAPIError as error:
            log.warning("claim.missed", job_id=job_id, error=str(error)[:300])
            return
        if claim is None:
            return
        log.info("attempt.started", job_id=job_id, attempt_id=claim.attempt_id)
        self.tally.renders += 1
        refusals = self.tally.refusals
        self.tally.held.add(claim.attempt_id)
        folder = scratch.AttemptFolder(
            root=self.config.scratch_dir, batch_id=claim.batch_id, attempt_id=claim.attempt_id
        )
        with contextlib.ExitStack() as parts:
            parts.enter_context(self._ending(claim, folder, refusals))
            heart = parts.enter_context(self._heart(claim))
            with self._traced("attempt", claim):
                left = self._render(claim, folder, heart)
            rest = parts.pop_all()
            self.tail.do(lambda: self._finish(claim, left, rest))
        while not self.tail.wait(leave=self._most_tails(), seconds=TAIL_LOOK_SECONDS):
            heart.keep()  # the tail before it has a heart of its own

    def _most_tails(self) -> int:
        """A host that cannot keep up holds up its device: one beside the next job, not many.

        Those do not count that only wait: weights are hashed once per host, for a minute.
        """
        return 1 + min(self.renderer.num_waiting(), MOST_AWAITING_HASHES)

    def end(self, *, seconds: float | None = None) -> bool:
        """Finish what is left of the videos that are rendered. False: not within these seconds."""
        self.renderer.hurry()
        return self.tail.wait(seconds=seconds)

    def _finish(self, claim: lifecycle.Claim, left: Left, rest: contextlib.ExitStack) -> None:
        try:
            with rest, self._traced("finish", claim):
                left()
        except Exception:
            # Not the next job's, which would be the one to hear of it.
            log.exception("tail.failed", job_id=claim.job_id, attempt_id=claim.attempt_id)

    @contextlib.contextmanager
    def _ending(
        self, claim: lifecycle.Claim, folder: scratch.AttemptFolder, refusals: int
    ) -> Iterator[None]:
        """However it ends, in whichever thread. `refusals`: how many there were when it began."""
        is_known = True
        try:
            yield
        except errors.AttemptEnded as ended:
            folder.remove()
            self._end(claim, ended)
        except errors.HostFault as fault:
            folder.remove()
            self._give_back(claim, fault)
        except Exception as error:
            folder.remove()
            self._fail(claim, error)
        else:
            is_known = self._hand_over(
                claim, folder, is_newest_word=refusals == self.tally.refusals
            )
        finally:
            if is_known:
                self.tally.held.discard(claim.attempt_id)
            self._report()
            self.bell.kick()

    def _heart(self, claim: lifecycle.Claim) -> heartbeat.Heartbeat:
        return heartbeat.Heartbeat(
            self.db,
            claim.attempt_id,
            lease_seconds=self.config.lease_seconds,
            worker_settings=self.worker_settings,
            on_stall=lambda: self._stalled(claim),
        )

    def _stalled(self, claim: lifecycle.Claim) -> None:
        """Said before this process ends, or the blame would be the newest attempt's."""
        try:
            self.db.write(self._blame, claim)
        except Exception as error:
            log.warning("attempt.not_told", error=str(error)[:300])
        finally:
            heartbeat.end_process()

    def _blame(self, session: Session, claim: lifecycle.Claim) -> None:
        seconds = self.worker_settings.stall_seconds
        lifecycle.fail(
            session,
            claim.attempt_id,
            kind=states.FailureKind.WORKER_LOST,
            error=f"no progress for {seconds:.0f} s: its process was ended",
            budgets=retries.budgets(self.config),
        )
        lifecycle.release_worker(
            session,
            self.worker_settings.worker_name,
            reason="its process was ended, because a job beside it stood still",
        )

    def _traced(self, name: str, claim: lifecycle.Claim) -> contextlib.AbstractContextManager[None]:
        return tracing.job(
            name,
            batch_id=claim.batch_id,
            job_id=claim.job_id,
            attempt=claim.number,
            queue=claim.queue,
        )

    def _claim(self, job_id: int) -> lifecycle.Claim | None:
        claim = self.db.write(
            lifecycle.claim,
            job_id,
            worker=self.worker_settings.worker_name,
            lease_seconds=self.config.lease_seconds,
            max_running_per_owner=self.config.max_running_per_owner,
        )
        if claim is None:
            # Perhaps by ourselves, a moment ago, on a connection that broke before we heard of
            # it. We render nothing now: what runs under our name unknown to us is forgotten.
            released = self.db.write(
                lifecycle.release_worker,
                self.worker_settings.worker_name,
                reason="its worker did not hear that it had claimed the job",
                keep=tuple(self.tally.held),
            )
            log.info("claim.refused", job_id=job_id, released=released)
        return claim

    def _lacks_room(self) -> bool:
        """This host's fault, not the job's: it stays queued, and its message is sent again."""
        reason = f"{self.config.scratch_dir}: "
        try:
            free = scratch.free_bytes(self.config.scratch_dir)
        except OSError as error:
            reason += str(error)
        else:
            if free >= workers.MIN_FREE_BYTES:
                return False
            reason += f"{free / 1e6:.0f} MB free, too little for a video"
        self._refuse(workers.ALL_QUEUES, states.FailureKind.DISK, reason)
        return True

    def _render(
        self, claim: lifecycle.Claim, folder: scratch.AttemptFolder, heart: heartbeat.Heartbeat
    ) -> Left:
        self.safety.look_at_prompt(claim)
        return render(self.renderer, claim, folder, heart)

    def _hand_over(
        self, claim: lifecycle.Claim, folder: scratch.AttemptFolder, *, is_newest_word: bool
    ) -> bool:
        """Leave the finished video to this host's publisher; the device is free from here on.

        False: the database was not told, and still takes the attempt for one of this process.
        """
        is_known = False
        try:
            if is_newest_word:
                self._accept(claim)
            verdict = finished.renew(self.db, self.config, folder, note=None)
            is_known = True
            if verdict is lifecycle.Verdict.GO_ON:
                self.bell.send_publish(self.config.host_name, claim.attempt_id)
        except (DBAPIError, broker.BrokerUnavailable) as error:
            # The launcher finds the finished folder and sends again.
            log.warning("publish.not_sent", attempt_id=claim.attempt_id, error=str(error)[:300])
        log.info("attempt.rendered", job_id=claim.job_id, attempt_id=claim.attempt_id)
        return is_known

    def _end(self, claim: lifecycle.Claim, ended: errors.AttemptEnded) -> None:
        event = "attempt.superseded"
        if isinstance(ended, errors.AttemptCancelled):
            event = "attempt.cancelled"
            try:
                self.db.write(lifecycle.cancel_attempt, claim.attempt_id)
            except DBAPIError as unreachable:
                # The lease ends by itself, and the job is cancelled then.
                log.warning("attempt.not_told", error=str(unreachable)[:300])
        log.info(event, job_id=claim.job_id, attempt_id=claim.attempt_id)

    def _give_back(self, claim: lifecycle.Claim, fault: errors.HostFault) -> None:
        """The job waits for a better host, and this one steps aside."""
        reason = str(fault)
        queue = workers.ALL_QUEUES if fault.is_of_all_queues else claim.queue
        facts = {"job_id": claim.job_id, "attempt_id": claim.attempt_id, "kind": fault.kind}
        log.error("attempt.given_back", **facts, error=reason)
        try:
            # First: or this worker might be sent the job again.
            self._refuse(queue, fault.kind, reason)
            wait_seconds = retries.wait_after_release(claim.number)
            self.db.write(
                lifecycle.release, claim.attempt_id, reason=reason, wait_seconds=wait_seconds
            )
        except DBAPIError as unreachable:
            # The lease ends by itself.
            log.warning("attempt.not_told", **facts, error=str(unreachable)[:300])

    def _refuse(self, queue: str, kind: states.FailureKind, reason: str) -> None:
        name = self.worker_settings.worker_name
        self.tally.refusals += 1
        try:
            seconds = self.db.write(workers.refuse, name, queue=queue, kind=kind, reason=reason)
        except IntegrityError:
            return  # another one of its jobs refused it in the same moment
        log.error("worker.refuses", queue=queue or "all", seconds=round(seconds), error=reason)
        if queue:
            with contextlib.suppress(broker.BrokerUnavailable):
                # Its launcher does it too, a little later, and for all queues.
                self.bell.steer(name, leave=[queue])

    def _accept(self, claim: lifecycle.Claim) -> None:
        """It went well: what this worker refused of the queue, and why, is over."""
        self.db.write(workers.accept, self.worker_settings.worker_name, queue=claim.queue)

    def _report(self) -> None:
        """What this process holds, for people; a word that is lost does no harm."""
        try:
            told = self.renderer.report(renders=self.tally.renders)
            self.db.write(workers.report, self.worker_settings.worker_name, told)
        except (DBAPIError, RuntimeError) as error:  # the second: torch's, of a lost device
            log.warning("worker.report_missed", error=str(error)[:200])

    def _fail(self, claim: lifecycle.Claim, error: Exception) -> None:
        kind = error.kind if isinstance(error, errors.RenderError) else states.FailureKind.INTERNAL
        message = str(error) if isinstance(error, errors.RenderError) else _described(error)
        detail = "".join(traceback.format_exception(error))
        facts = {"job_id": claim.job_id, "attempt_id": claim.attempt_id, "kind": kind}
        log.error("attempt.failed", **facts, error=message, detail=detail)
        try:
            self.db.write(
                lifecycle.fail,
                claim.attempt_id,
                kind=kind,
                error=message,
                budgets=retries.budgets(self.config),
                detail=detail,
            )
        except DBAPIError as unreachable:
            # The lease ends by itself.
            log.warning("attempt.not_told", **facts, error=str(unreachable)[:300])
        if kind is states.FailureKind.DEVICE:
            # This process can no longer use its device; its parent starts a fresh one.
            self.bell.kick()
            try:
                if not self.end(seconds=LAST_TAIL_SECONDS):
                    reason = "its process was ended, because a job beside it lost the device"
                    name = self.worker_settings.worker_name
                    self.db.write(lifecycle.release_worker, name, reason=reason)
            finally:
                tracing.end()
                os._exit(DEVICE_LOST)


def render(
    renderer: Renderer,
    claim: lifecycle.Claim,
    folder: scratch.AttemptFolder,
    heart: heartbeat.Progress,
) -> Left:
    """All that the device does; out of memory, it is tried once more with less on the device.

    DeviceOutOfMemory: there is no less, or it did not help.
    """
    try:
        return renderer.render(claim, folder, heart)
    except errors.DeviceOutOfMemory as error:
        ran_out = str(error)
    # Outside of the handler: the exception holds on to every tensor of the failed try.
    lower = renderer.step_down(claim.spec.look)
    if lower is None:
        raise errors.DeviceOutOfMemory(f"{ran_out}; there is no smaller memory mode")
    log.warning("memory.stepped_down", job_id=claim.job_id, mode=lower, error=ran_out)
    return renderer.render(claim, folder, heart, ran_out=ran_out)


def make() -> Runner:
    """From the environment of this process. Touches the device for the first time."""
    config = settings.load()
    worker_settings = worker_settings_module.load()
    asked = checks.Checks.load(config, worker_settings)
    if worker_settings.traces:
        tracing.start(worker=worker_settings.worker_name)
    return Runner(
        config=config,
        worker_settings=worker_settings,
        db=database.connect_service(config),
        bell=broker.Broker(config),
        renderer=_renderer(config, worker_settings, asked),
        safety=asked,
    )


def _renderer(
    config: settings.Settings,
    worker_settings: worker_settings_module.WorkerSettings,
    asked: checks.Checks,
) -> Renderer:
    # Each on its own: a simulated device needs no torch.
    if worker_settings.device == "sim":
        from worker import simulation

        return simulation.SimulatedRenderer(worker_settings)
    from worker import rendering

    return rendering.make(config, worker_settings, asked)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
