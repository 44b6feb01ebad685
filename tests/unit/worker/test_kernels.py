"""What a process computes with is chosen once, told loudly where it is slow, and recorded."""

import sys

import pytest
import structlog
import torch

from models import attention, fusion
from worker import errors, kernels
from worker.device import Device
from worker.settings import WorkerSettings

CPU = Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="CPU")
GPU = Device(torch_device=torch.device("cuda"), dtype=torch.bfloat16, name="a GPU")
HOPPER = attention.Machine(capability=(9, 0), cudnn=91900)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before, runner = attention._kernel, fusion._runner
    yield
    attention.use(before)
    fusion.run_with(runner)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Pretends: this machine has a GPU of that kind, triton and a C compiler."""

    def pretend(machine=HOPPER, *, triton=True, gcc="/usr/bin/gcc"):
        monkeypatch.setattr(attention, "this_machine", lambda: machine)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: triton or None)
        monkeypatch.setattr(kernels.shutil, "which", lambda name: gcc if name == "gcc" else None)
        monkeypatch.delenv("CC", raising=False)

    return pretend


def set_up(tmp_path, device=CPU, **settings):
    with structlog.testing.capture_logs() as logs:
        compiler = kernels.set_up(
            WorkerSettings(**{f"RUSHES_{key.upper()}": value for key, value in settings.items()}),
            device,
            cache=tmp_path / "kernels",
        )
    return compiler, logs


def test_a_cpu_compiles_nothing_unless_asked(tmp_path):
    compiler, _ = set_up(tmp_path)
    assert compiler is None
    assert kernels.description(compiler)["pointwise"] == "eager"
    compiler, _ = set_up(tmp_path, compile="on")
    assert fusion._runner is compiler
    assert kernels.description(compiler)["pointwise"] == "compiled"


def test_a_gpu_compiles_and_keeps_the_kernels_in_the_home_folder(tmp_path, on_a_gpu):
    on_a_gpu()
    compiler, logs = set_up(tmp_path, GPU)
    assert compiler is not None
    assert kernels.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels")
    assert logs == []


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ({"triton": False}, "triton"),
        ({"gcc": None}, "gcc"),
        ({"machine": attention.Machine(capability=(6, 1), cudnn=91900)}, "old"),
    ],
)
def test_a_gpu_without_what_it_takes_says_why_it_is_eager(lacks, says, tmp_path, on_a_gpu):
    on_a_gpu(**lacks)
    compiler, logs = set_up(tmp_path, GPU)
    assert compiler is None
    assert [says in log["because"] for log in logs if log["event"] == "kernels.eager"] == [True]


def test_an_old_cudnn_is_told_loudly(tmp_path, on_a_gpu):
    on_a_gpu(attention.Machine(capability=(9, 0), cudnn=90100))
    _, logs = set_up(tmp_path, GPU)
    warnings = [log for log in logs if log["log_level"] == "warning"]
    assert [log["event"] for log in warnings] == ["attention.slow"]
    assert "LD_LIBRARY_PATH" in warnings[0]["because"]


def test_a_kernel_that_was_asked_for_and_is_missing_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(errors.DeviceFault, match="RUSHES_ATTENTION is sage"):
        set_up(tmp_path, attention="sage")
