"""The GPUs of this machine and their driver."""

import importlib.util
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jobs import errors, programs, settings
from jobs.doctor import checks

LEAST_DRIVERS = {"12": 525, "13": 580}  # of NVIDIA, by CUDA's major version


def check(_config: settings.Settings) -> Iterator[checks.Check]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield checks.warn(
            "devices", "no NVIDIA driver here: workers would render on the CPU", NO_GPU
        )
        return
    columns = "index,name,memory.total,memory.free,driver_version"
    try:
        command = [program, f"--query-gpu={columns}", "--format=csv,noheader"]
        done = programs.run(command, seconds=checks.PROGRAM_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        yield checks.fail("devices", f"nvidia-smi: {errors.first_line(error)}", NO_DRIVER)
        return
    driver, odd = None, []
    for row in filter(str.strip, (*done.stdout.splitlines(), *done.stderr.splitlines())):
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 5 and cells[0].isdecimal() and all(cells):
            index, name, total, free, driver = cells
            yield checks.ok(f"device {index}", f"{name}, {total}, {free} free")
        else:
            odd.append(row.strip())
    said = "; ".join(odd)[:300]
    seen = f"nvidia-smi ends with status {done.returncode}" + (f": {said}" if said else "")
    if driver is not None:
        if done.returncode or odd:
            yield checks.warn("devices", seen, BAD_GPU)
        yield from _driver(driver)
    elif done.returncode:
        yield checks.fail("devices", seen, NO_DRIVER)
    else:
        seen = "the NVIDIA driver lists no GPU" + (f": {said}" if said else "")
        yield checks.warn("devices", seen, NO_GPU)


NO_GPU = "fine for the tiny model and for submitting; a 14B model needs a GPU"
BAD_GPU = "workers render on the GPUs that it lists; look at the others, and at `nvidia-smi -q`"
NO_DRIVER = "repair the NVIDIA driver; where there is no GPU, start workers with --devices cpu"


def _driver(version: str) -> Iterator[checks.Check]:
    """Whether torch can use it; says nothing where one of the two does not tell its version."""
    cuda = _cuda_of_torch()
    least = LEAST_DRIVERS.get(cuda.split(".")[0])
    major = version.split(".")[0]
    if least is None or not major.isdecimal():
        return
    seen = f"{version}; torch's CUDA {cuda} needs {least} or newer"
    if int(major) >= least:
        yield checks.ok("NVIDIA driver", seen)
    else:
        advice = "workers may see no GPU: install a newer driver, or a torch with an older CUDA"
        yield checks.warn("NVIDIA driver", seen, advice)


def _cuda_of_torch() -> str:
    """Empty where it has none; read from its file, since to load it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    return str(runpy.run_path(str(Path(found.origin).with_name("version.py"))).get("cuda") or "")
