"""What a benchmark ran on. Loads no torch: some of them count the memory of their process."""

import platform
from pathlib import Path


def processor() -> str:
    """Its name; of one whose kernel does not tell it, what it is called by Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
