"""Two processes that share the networks train what one process trains on the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

SCRIPT = Path(__file__).with_name("two_processes.py")
RATE = 1e-3  # as in the script: the largest change of a weight by one update


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, env=environment)


def train(folder: Path, *arguments: str, count: int) -> list[dict[str, float]]:
    folder.mkdir()
    ranks = [
        start(folder, *arguments, RANK=str(rank), WORLD_SIZE=str(count)) for rank in range(count)
    ]
    assert [process.wait(240) for process in ranks] == [0] * count
    return json.loads((folder / "updates.json").read_text())


@pytest.mark.parametrize(
    ("weights", "dtype", "changes"),
    [
        ("full", "float32", {"ida": 0.97, "regression": 1.0}),
        ("lora", "bfloat16", {"sgmd": 0.1, "ratio": 1, "accumulate": 2}),
    ],
)
def test_two_processes_train_what_one_does(tmp_path, weights, dtype, changes):
    """Every update, the exported weights, and after a resume from shares."""
    arguments = (weights, dtype, json.dumps(changes))
    alone = train(tmp_path / "alone", *arguments, count=1)
    together = train(tmp_path / "together", *arguments, count=2)
    loose = 1e-4 if dtype == "float32" else 2e-2
    for one, two in zip(alone, together, strict=True):
        del one["seconds"], two["seconds"]
        assert two == pytest.approx(one, rel=loose, abs=loose / 10)
    folder = "distill_models" if weights == "full" else "loras"
    file = next((tmp_path / "alone" / folder).iterdir()).relative_to(tmp_path / "alone")
    ours = safetensors.torch.load_file(tmp_path / "together" / file)
    theirs = safetensors.torch.load_file(tmp_path / "alone" / file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = (ours[name].float() - tensor.float()).abs()
        scale = max(float(tensor.abs().max()), RATE)
        # Adam's first steps go by the sign of a gradient, which rounding may turn.
        assert float(difference.mean()) < (0.01 if dtype == "float32" else 0.1) * scale, name
