"""Submitting and launching never load the GPU stack."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["jobs.cli", "jobs.dispatch", "worker.launch"])
def test_importing_it_loads_no_torch(module: str) -> None:
    script = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'models', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
