"""Which kernels this process computes with: attention, and whether chains are compiled."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import structlog

from models import attention, fusion
from worker import errors
from worker.device import Device
from worker.settings import WorkerSettings

log = structlog.get_logger()

OLDEST_CAPABILITY = (7, 0)  # of what torch's compiler makes kernels for


def set_up(
    worker_settings: WorkerSettings, device: Device, *, cache: Path
) -> fusion.Compiler | None:
    """Choose once per process, before anything is computed. Compiled kernels are kept in `cache`.

    Raises DeviceFault for a kernel that was asked for and is not there.
    """
    _set_up_attention(worker_settings.attention, device)
    why_not = None if worker_settings.compile == "on" else _why_not(worker_settings.compile, device)
    if why_not is not None:
        log.info("kernels.eager", because=why_not)
        fusion.run_with(fusion.eagerly)
        return None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))
    compiler = fusion.Compiler(on_failure=_tell)
    fusion.run_with(compiler)
    return compiler


def description(compiler: fusion.Compiler | None) -> dict[str, Any]:
    """For the sidecar: what really ran."""
    is_compiled = compiler is not None and compiler.is_working
    return {
        "attention": attention.names(),
        "pointwise": "compiled" if is_compiled else "eager",
    }


def _set_up_attention(wanted: str, device: Device) -> None:
    if wanted in attention.OTHER_KERNELS:
        try:
            attention.use(attention.OtherKernel(wanted))
        except ImportError as error:
            module = attention.OTHER_KERNELS[wanted][0]
            message = f"RUSHES_ATTENTION is {wanted}, but {module} cannot be imported: {error}"
            raise errors.DeviceFault(message) from error
        return
    choice = attention.Choice()
    if device.is_cuda and wanted == "auto":
        choice = attention.choose(attention.this_machine())
    if choice.warning is not None:
        log.warning("attention.slow", because=choice.warning)
    attention.use(attention.TorchKernels(choice.backends))


def _why_not(wanted: str, device: Device) -> str | None:
    """Why nothing is compiled; None: it can be."""
    if wanted == "off":
        return "RUSHES_COMPILE is off"
    if not device.is_cuda:
        return "it pays on a GPU only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler: install gcc"
    capability = attention.this_machine().capability
    if capability is None or capability < OLDEST_CAPABILITY:
        return "the GPU is too old"
    return None


def _tell(error: Exception) -> None:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    log.warning("kernels.not_compiled", error=first[:500], then="all chains run eagerly")
