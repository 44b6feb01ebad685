"""Two hosts in network namespaces of their own; one is cut off from everything, and comes back.

Takes most of a minute, for leases to end: `make cables` runs it, `make test` does not.
"""

import io
import json
import logging
import os
import time

import pytest

from jobs import presets, queries, states, stores, submission
from tests.chaos import cables, farm
from tests.chaos.workload import PRESET

log = logging.getLogger(__name__)  # shown with --log-cli-level=INFO

why = cables.why_not() if os.environ.get("RUSHES_TEST_CABLES") else "make cables runs it"
pytestmark = pytest.mark.skipif(why is not None, reason=str(why))

PLAN = farm.Plan(
    workers_per_host=1,
    dispatchers=1,
    step_seconds=0.25,
    lease_seconds=9.0,
    heartbeat_seconds=0.5,
    publish_lease_seconds=15.0,
    tick_seconds=0.5,
    retry_seconds=0.1,
    skew_seconds=0.0,
)


class Hosts:
    """The farm, as somebody sees it who is never cut off."""

    def __init__(self, running, folder):
        self.farm, self.db = running, running.direct_database()
        self.preset = folder / "preset.json"
        self.preset.write_text(json.dumps(PRESET))
        self.store = stores.open_store(running.config)

    def submit(self, number):
        rows = "".join(json.dumps({"prompt": f"clip {n}"}) + "\n" for n in range(number))
        prompts = submission.PromptFile(
            stream=io.BytesIO(rows.encode()),
            source="test",
            format="jsonl",
            options=submission.Options(preset=presets.load(str(self.preset))),
        )
        return submission.submit(self.db, prompts).batch_id

    def jobs(self, batch_id):
        with self.db.reading() as session:
            return list(queries.jobs(session, batch_id, limit=1_000))

    def attempts(self, batch_id):
        """(host, attempt), of all jobs."""
        found = []
        with self.db.reading() as session:
            for job in queries.jobs(session, batch_id, limit=1_000):
                for attempt in queries.attempts(session, job.id):
                    found.append((attempt.worker.rpartition("@")[2], attempt))
        return found

    def until(self, look, *, seconds=120.0):
        began = time.monotonic()
        while not (found := look()):
            assert time.monotonic() < began + seconds, self.told()
            time.sleep(0.05)
        return found, time.monotonic() - began

    def told(self):
        return "\n".join(path.read_text()[-1500:] for path in self.farm.logs())

    def renders_on(self, batch_id, host):
        return [
            attempt
            for name, attempt in self.attempts(batch_id)
            if name == host and attempt.state is states.AttemptState.RUNNING
        ]

    def is_done(self, batch_id):
        return all(job.state is states.JobState.SUCCEEDED for job in self.jobs(batch_id))


def test_a_host_that_is_cut_off_loses_nothing_and_takes_part_again(tmp_path):
    with farm.running(PLAN, tmp_path, on_cables=True) as running:
        hosts = Hosts(running, tmp_path)
        first = hosts.submit(5)
        (cut, *_), _ = hosts.until(lambda: hosts.renders_on(first, "host1"))
        running.cables.pull(1)
        _, seconds = hosts.until(lambda: hosts.is_done(first))
        log.info("the others finished the batch %.1f s after the cable was pulled", seconds)
        assert [job.error_count for job in hosts.jobs(first)] == [0] * 5

        launcher = running.hosts[1].launcher.pid
        running.cables.plug(1)
        # Long enough for both: whoever is there takes a job at a time.
        second = hosts.submit(8)
        _, seconds = hosts.until(lambda: hosts.renders_on(second, "host1"))
        log.info("the host renders again %.1f s after the cable was plugged in", seconds)
        hosts.until(lambda: hosts.is_done(second))
        assert running.hosts[1].launcher.is_alive
        assert running.hosts[1].launcher.pid == launcher

        ended = {attempt.id: attempt.state for _, attempt in hosts.attempts(first)}
        assert ended[cut.id] is states.AttemptState.LOST
        for batch_id in (first, second):
            for job in hosts.jobs(batch_id):
                tries = [a for _, a in hosts.attempts(batch_id) if a.job_id == job.id]
                won = [a for a in tries if a.state is states.AttemptState.SUCCEEDED]
                assert [a.id for a in won] == [job.attempt_id]
                assert hosts.store.head(won[0].video_key).size_bytes == won[0].video_bytes
        # What it had rendered for nobody is cleared away.
        hosts.until(lambda: not list(running.hosts[1].scratch.iterdir()))
        hosts.db.close()
