"""Two processes that share the tokens of a video compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("shared_tokens.py")
CASES = [
    f"{task} {dtype} {run}"
    for task in ("t2v", "i2v")
    for dtype in ("float64", "bfloat16")
    for run in ("forward of two", "euler", "renoise")
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which both processes have left what they found."""
    folder = tmp_path_factory.mktemp("pair")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(120) for process in ranks] == [0, -9]
    return folder


@pytest.fixture(scope="module")
def found(pair):
    return [json.loads((pair / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(found, case):
    """Uneven shares, two videos at once, a condition; bf16 is no further from fp64 than alone."""
    facts = found[0][case]
    print(case, facts)  # noqa: T201  # `pytest -rP` lists the numbers
    if "float64" in case:
        assert facts["difference"] < 1e-12
    else:
        assert facts["difference"] < 0.02
        assert facts["together"] <= 1.1 * facts["alone"]


def test_both_processes_have_the_whole_of_it(found):
    assert found[0] == found[1]
    assert set(found[0]) == set(CASES)


def test_a_killed_process_ends_the_forward_of_the_other(pair):
    """An error, and no video of half the tokens."""
    assert "onnection" in (pair / "0.lost").read_text()
