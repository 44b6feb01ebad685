"""What the measurements on a GPU share: times, peaks, kernels, a random transformer."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import measuring, networks
from benchmarks.measuring import REPEATS
from models import config, fusion, transformer

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
CONTEXT = (1, 512, 4096)


def warm_seconds(work: Callable[[], object], *, repeats: int = REPEATS) -> dict[str, float]:
    """Median and spread of what has been called before."""
    return measuring.spread([measuring.once(work) for _ in range(repeats)], "seconds")


@contextmanager
def emptied() -> Iterator[None]:
    """The device is empty before and after; its peak is counted from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9


def in_turns(works: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, all of them warm: a clock that drifts is the same for all."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(measuring.once(work))
    return found


def kernels_ms(work: Callable[[], object], *, most: int = 12) -> dict[str, Any]:
    """Milliseconds on the device by kernel, the longest first, and how many there were."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name[:90]
            spent[name] += event.time_range.elapsed_us() / 1e3
            calls[name] += 1
    longest = {name: [round(ms, 2), calls[name]] for name, ms in spent.most_common(most)}
    return {"all_ms": round(spent.total(), 1), "calls": calls.total(), "longest": longest}


def attempted(work: Callable[[], Any]) -> Any:
    """What it gives, or why it gave nothing: the rest of a part is worth having."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


@contextmanager
def compiled_chains() -> Iterator[list[str]]:
    """What could not be compiled is in the list."""
    failures: list[str] = []
    fusion.run_with(fusion.Compiler(on_failure=lambda error: failures.append(str(error)[:300])))
    try:
        yield failures
    finally:
        fusion.run_with(fusion.eagerly)


@torch.inference_mode(mode=False)  # weights that a mode may move
def random_transformer(sizes: config.TransformerConfig) -> transformer.WanTransformer:
    return networks.filled(networks.on_meta(sizes))


def inputs(latents: tuple[int, ...] = networks.LATENTS["480p"]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, *latents, device=DEVICE)
    return x, torch.tensor([937.5], device=DEVICE), torch.randn(*CONTEXT, device=DEVICE, dtype=BF16)
