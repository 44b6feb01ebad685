"""The one device that this process sees."""

import gc
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from models import rope
from worker import errors, host_memory
from worker.settings import WorkerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What torch and the libraries below it say in errors that have no class of their own.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|can't allocate memory"
    r"|CUDA (driver )?error: out of memory|\[CUDA\]: out of memory"
    r"|_STATUS_ALLOC_FAILED|_(HOST|DEVICE)_ALLOCATION_FAILED"
    r"|_NOT_INITIALIZED when calling `cublas(Lt)?Create"  # it had no memory for its handle
    r"|NVML_SUCCESS == .*CUDACachingAllocator"  # of a MIG slice: NVML tells nothing for the message
)
# cudaErrorMemoryAllocation: the one error after which CUDA can still be used.
CUDA_OUT_OF_MEMORY = 2
DEVICE_FAULT = re.compile(
    r"CUDA (driver )?error|Triton Error \[CUDA\]"  # the last two: of the launch of compiled kernels
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)"
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What to compute on, and in which precision."""

    torch_device: torch.device
    dtype: torch.dtype
    name: str

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what was asked: times and cancels are then true."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def reset_peak_memory(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_memory_bytes(self) -> int | None:
        """Since the last reset; None where the device does not count."""
        return torch.cuda.max_memory_allocated(self.torch_device) if self.is_cuda else None

    def total_bytes(self) -> int:
        """Memory that models may take: what we hold of the device and what nobody does."""
        if self.is_cuda:
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return int(free) + torch.cuda.memory_reserved(self.torch_device)
        return host_memory.now().total_bytes

    def used_bytes(self) -> int:
        """Of the device by anybody; where the device is the processor, by this process."""
        if self.is_cuda:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            return int(total) - int(free)
        return host_memory.process_bytes()

    def give_up_caches(self) -> None:
        """Memory of what was dropped goes back to device and machine, not to our next use."""
        rope.table.cache_clear()  # of sizes that may not come again
        gc.collect()
        host_memory.trim()
        if self.is_cuda:
            torch.cuda.empty_cache()
            _empty_host_cache()

    def description(self) -> dict[str, Any]:
        """For the sidecar: what exactly rendered this video."""
        facts: dict[str, Any] = {
            "device": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        if self.is_cuda:
            facts |= {
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch's own
                "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            }
        return facts

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Name the failures that are the device's: out of memory, or broken for this process."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            told = f"{self.name}: {_first_line(error)}"
            if _is_out_of_memory(error):
                self._give_up_cache_of_full_one()
                raise errors.DeviceOutOfMemory(told) from error
            # An illegal access, an ECC error, a lost GPU: the CUDA context is gone for good.
            if isinstance(error, torch.AcceleratorError) or DEVICE_FAULT.search(str(error)):
                raise errors.DeviceFault(told) from error
            raise

    def _give_up_cache_of_full_one(self) -> None:
        """DeviceFault where it is lost instead: cuBLAS says the same of both."""
        try:
            torch.cuda.empty_cache()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise errors.DeviceFault(f"{self.name}: {_first_line(error)}") from error


def current(worker_settings: WorkerSettings) -> Device:
    """The launcher has hidden all but one GPU from this process."""
    wanted = worker_settings.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = torch.device(wanted)
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise errors.DeviceFault(
            "no CUDA device is visible; look at nvidia-smi and the driver, "
            f"which must be new enough for torch's CUDA ({torch.version.cuda})"
        )
    _set_precision()
    is_cuda = torch_device.type == "cuda"
    dtype = worker_settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_cuda else "float32"
    name = torch.cuda.get_device_name(torch_device) if is_cuda else f"CPU {platform.machine()}"
    return Device(torch_device=torch_device, dtype=DTYPES[dtype], name=name)


def _set_precision() -> None:
    """As torch has it, whatever a library left: on GPUs, fp32 is TF32 in convolutions alone."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def _is_out_of_memory(error: Exception) -> bool:
    """torch's own allocator has a class for it; what asks CUDA itself has a number or words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    is_numbered = getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY
    return is_numbered or OUT_OF_MEMORY.search(str(error)) is not None


def _empty_host_cache() -> None:
    """Give pinned memory back; torch 2.11 has no public name for it."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    empty = empty or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
