"""The workers and the dispatcher: who is alive."""

import pytest

from jobs import database, workers
from jobs.doctor import processes
from tests.registrations import registration
from tests.told import told_by


@pytest.mark.usefixtures("no_broker")
def test_workers_of_a_host_without_models_are_told(db: database.Database) -> None:
    db.write(workers.register, registration("gpu0@a"))
    assert told_by(processes.check)["workers"].status == "ok"
    db.write(workers.register, registration("gpu0@b", queues=()))
    found = told_by(processes.check)["workers"]
    assert (found.status, "gpu0@b" in found.seen, "gpu0@a" in found.seen) == ("warn", True, False)
