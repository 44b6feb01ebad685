"""Python imports this at its start when the folder is on PYTHONPATH: a process with a wrong clock.

`time.monotonic` and the kernel's time stamps stay right, as on a machine whose clock is wrong.
"""

import datetime
import os

import time_machine

SKEW_SECONDS = float(os.environ["RUSHES_CHAOS_SKEW_SECONDS"])
time_machine.travel(
    datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=SKEW_SECONDS), tick=True
).start()
