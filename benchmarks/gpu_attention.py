"""Attention of 14B by every kernel that is here, and what a GPU keeps up when it gets warm."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import gpu_common as gpu
from benchmarks import measuring, networks
from models import attention, config

TOKENS = {
    size: math.prod(config.WAN_T2V_14B.grid(latents)) for size, latents in networks.LATENTS.items()
}
EXACT_TOKENS = 64
ROUNDS = 3
SUSTAINED_SECONDS = 4.0


def kernels(_report: measuring.Report) -> dict[str, Any]:
    """Seconds of each in turns, in the state of a GPU that has been at work for a while."""
    found: dict[str, Any] = {}
    for size, tokens in TOKENS.items():
        with gpu.emptied(), torch.inference_mode():
            found[size] = _of_size(tokens)
    return found


def _of_size(tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = config.WAN_T2V_14B
    shape = 1, tokens, sizes.num_heads, sizes.head_dim
    q, k, v = (torch.randn(shape, device=gpu.DEVICE, dtype=gpu.BF16) for _ in range(3))
    exact = _exact(q[:, :EXACT_TOKENS], k, v)
    operations = 4 * tokens**2 * sizes.num_heads * sizes.head_dim
    told: dict[str, Any] = {}
    works: dict[str, Callable[[], Tensor]] = {}
    for name, kernel in _there(told).items():
        began = time.perf_counter()
        y = gpu.attempted(lambda kernel=kernel: kernel(q, k, v))
        if isinstance(y, str):
            told[name] = y
            continue
        measuring.synchronize()
        told[name] = {
            "first_seconds": time.perf_counter() - began,
            "error": measuring.relative(y[:, :EXACT_TOKENS], exact),
        }
        works[name] = lambda kernel=kernel: kernel(q, k, v)
    _warmed(next(iter(works.values())))
    for name, times in gpu.in_turns(works, rounds=ROUNDS).items():
        seconds = statistics.median(times)
        told[name] |= {"seconds": times, "tflops": operations / seconds / 1e12}
    return told


def _there(told: dict[str, Any]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Torch's own one by one, and of other packages those that are installed."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        name: attention.TorchKernels([backend])
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
        )
    }
    for name in attention.OTHER_KERNELS:
        try:
            found[name] = attention.OtherKernel(name)
        except ImportError as error:
            told[name] = f"not installed: {error}"
    return found


def _exact(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """In fp32, of a few queries."""
    scores_BNLS = torch.einsum("blnk,bsnk->bnls", q_BLNK.float(), k_BSNK.float())
    weights_BNLS = (scores_BNLS * q_BLNK.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bnls,bsnk->blnk", weights_BNLS, v_BSNK.float())


def sustained(_report: measuring.Report) -> dict[str, Any]:
    """The rate of large products after seconds of work: then power is what limits a GPU."""
    a, b = (torch.randn(8192, 8192, device=gpu.DEVICE, dtype=gpu.BF16) for _ in range(2))
    many = 20

    def work() -> None:
        for _ in range(many):
            torch.mm(a, b)

    _warmed(work)
    seconds = statistics.median(measuring.once(work) for _ in range(measuring.REPEATS))
    return {"matmul_tflops": many * 2 * 8192**3 / seconds / 1e12, **_state(work)}


def _warmed(work: Callable[[], object]) -> None:
    until = time.perf_counter() + SUSTAINED_SECONDS
    while time.perf_counter() < until:
        measuring.once(work)


def _state(work: Callable[[], object]) -> dict[str, str]:
    """What the driver tells of clock and power while it works."""
    asked = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    work()  # not waited for
    told = measuring.told_by_driver(*asked).partition("\n")[0]
    measuring.synchronize()
    return dict(zip(asked, (value.strip() for value in told.split(",")), strict=False))
