"""The Celery tasks of a worker, one call each. Loads torch only in a process that renders."""

import functools
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

import structlog
from celery import signals
from celery.exceptions import SecurityWarning

from jobs import celery_app, database, logs, semaphores, settings
from worker import finished, pool_names, redis_transport, tracing
from worker import settings as worker_settings

if TYPE_CHECKING:
    from worker.publisher import Publisher
    from worker.runner import Runner

log = structlog.get_logger()

# It warns of pickled messages from strangers; we accept JSON alone.
warnings.filterwarnings("ignore", category=SecurityWarning)

redis_transport.install()
pool_names.install()
app = celery_app.make(settings.load())


@app.task(name=celery_app.RENDER_TASK)
def render(job_id: int) -> None:
    runner().run_attempt(job_id)


@app.task(name=celery_app.PUBLISH_TASK)
def publish(attempt_id: int) -> None:
    publisher().publish(attempt_id)


@functools.cache
def runner() -> "Runner":
    from worker import runner as module

    return module.make()


@functools.cache
def publisher() -> "Publisher":
    from worker import publisher as module

    return module.make()


@signals.setup_logging.connect
def _configure_logs(**_: object) -> None:
    logs.configure(settings.load())


@signals.worker_init.connect
def _check_machine(**_: object) -> None:
    """Celery's own words for it name no reason. A publisher has threads and needs none."""
    name = os.environ.get("RUSHES_WORKER_NAME")
    if name and (refusal := semaphores.refusal()):
        logs.configure(settings.load())
        log.critical("worker.cannot_start", worker=name, error=f"{refusal}; {semaphores.ADVICE}")
        sys.exit(1)


@signals.worker_process_init.connect
def _begin(**_: object) -> None:
    """A new child renders in place of one that died: what that one held is lost."""
    name = os.environ.get("RUSHES_WORKER_NAME", "")
    try:
        config = settings.load()
        logs.configure(config)
        name = worker_settings.load().worker_name
        finished.end_lost(database.connect_service(config), config, name)
        runner()
    except BaseException as error:
        # Celery would go on with a child that cannot render; the launcher starts a fresh pair.
        log.critical("worker.cannot_start", worker=name, error=str(error), exc_info=True)
        os.killpg(0, signal.SIGKILL)


@signals.worker_process_shutdown.connect
def _end(**_: object) -> None:
    """Celery's children leave by `os._exit`, without the exit handlers of their libraries."""
    try:
        if runner.cache_info().currsize:
            runner().end()
    finally:
        tracing.end()
