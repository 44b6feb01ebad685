"""How much work and how many strikes: the long form, and the short one inside `make test`."""

import math

from tests.chaos.farm import Plan
from tests.chaos.run import Script

LONG_JOBS = 10_000
LONG_STRIKES = {
    "kill child": 40,
    "kill parent": 25,
    "kill launcher": 12,
    "kill publisher": 12,
    "kill dispatcher": 11,
    "stop child past its lease": 8,
    "stop host past its lease": 2,
    "drain host": 6,
    "terminate parent": 6,
    "redis flushed": 5,
    "redis lost": 5,
    "redis restarted": 2,
    "redis stopped": 2,
    "redis half open": 2,
    "postgresql restarted": 5,
    "postgresql backends ended": 4,
    "postgresql half open": 2,
    "redis connections forgotten": 3,
    "redis connections cut": 4,
    "postgresql connections forgotten": 3,
    "postgresql stopped": 2,
    "messages of strangers": 2,
    "store busy": 3,
    "store denies": 3,
    "store answers lost": 3,
    "store half open": 2,
    "store away over a restart": 2,
    "disk full": 3,
    "device bad": 3,
    "batch paused": 6,
}
SHORT_STRIKES = {
    "kill child": 2,
    "kill parent": 1,
    "kill launcher": 1,
    "kill publisher": 1,
    "kill dispatcher": 1,
    "stop child past its lease": 1,
    "drain host": 1,
    "terminate parent": 1,
    "redis flushed": 1,
    "redis lost": 1,
    "redis connections cut": 1,
    "postgresql restarted": 1,
    "postgresql backends ended": 1,
    "postgresql connections forgotten": 1,
    "postgresql stopped": 1,
    "messages of strangers": 1,
    "store busy": 1,
    "store denies": 1,
    "store answers lost": 1,
    "store away over a restart": 1,
    "disk full": 1,
    "batch paused": 1,
}


def long(
    *, scale: float, seed: int, workers_per_host: int, on_sqlite: bool, minutes: float
) -> Script:
    """With the leases and beats of the defaults; a job has more crashes than by default.

    So many strikes hit some jobs three times by chance, and these are not to count as poison.
    """
    jobs = max(100, int(LONG_JOBS * scale))
    quotas = {what: math.ceil(number * scale) for what, number in LONG_STRIKES.items()}
    usual = sum(LONG_STRIKES.values()) * jobs / LONG_JOBS
    return Script(
        plan=Plan(workers_per_host=workers_per_host, on_sqlite=on_sqlite),
        jobs=jobs,
        batch_size=min(250, jobs // 4),
        poison_jobs=max(2, int(6 * scale)),
        late_batches=max(1, int(4 * scale)),
        quotas=quotas,
        strikes_per_job=sum(quotas.values()) / usual,
        outage_seconds=(3.0, 25.0),
        seed=seed,
        limit_seconds=60 * minutes + 600 + jobs * 1.0,
        # A slow machine gets fewer strikes, not more of them for each job.
        stuck_seconds=180.0,
        must_reach_goals=True,
        striking_seconds=60 * minutes,
    )


def short(*, seed: int, on_sqlite: bool = False) -> Script:
    """Those faults once that cost seconds, with leases of seconds."""
    # A dispatcher takes a database for silent that needs a sixth of a lease to answer: SQLite's
    # one writer may be a slow disk's.
    lease_seconds = 6.0 if on_sqlite else 3.0
    return Script(
        plan=Plan(
            workers_per_host=1,
            step_seconds=0.05,
            lease_seconds=lease_seconds,
            heartbeat_seconds=0.8,
            publish_lease_seconds=60.0,
            stall_seconds=lease_seconds + 1.5,
            tick_seconds=0.5,
            # A job that hangs takes both workers away each time, until they have started anew.
            max_crashes=4,
            retry_seconds=0.2,
            on_sqlite=on_sqlite,
        ),
        jobs=60,
        batch_size=20,
        poison_jobs=1,
        late_batches=0,
        quotas=dict(SHORT_STRIKES),
        outage_seconds=(1.0, 3.0),
        seed=seed,
        limit_seconds=450,
    )
