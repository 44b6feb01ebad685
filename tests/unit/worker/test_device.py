"""Which failures are the device's, and what a process is told about its device."""

import ctypes

import pytest
import torch

from models import rope
from worker import device, errors, host_memory
from worker.settings import WorkerSettings


def numbered(error_code):
    """As torch raises it: with CUDA's number."""
    error = torch.AcceleratorError("CUDA error: words of another version")
    error.error_code = error_code
    return error


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(h)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError(
            "NVML_SUCCESS == r INTERNAL ASSERT FAILED at "
            '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1407, please report a bug to PyTorch. '
        ),
        numbered(2),
        MemoryError(),
    ],
)
def test_too_little_memory_is_named_so(cpu, raised):
    with pytest.raises(errors.DeviceOutOfMemory, match="CPU test: ") as caught, cpu.faults():
        raise raised
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    "raised",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        numbered(700),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("CUDA driver error: an illegal memory access was encountered"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError("CUDA driver error: uncorrectable ECC error encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_broken_device_is_named_so(cpu, raised):
    with pytest.raises(errors.DeviceFault, match="CPU test: "), cpu.faults():
        raise raised


def test_a_lost_device_that_looks_like_a_full_one_is_lost(cpu, monkeypatch):
    """cuBLAS says the same of both; what is done about a full one tells them apart."""

    def lost():
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    with pytest.raises(errors.DeviceFault, match="launch failure"), cpu.faults():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")


def test_a_device_too_full_to_give_up_its_cache_is_full(cpu, monkeypatch):
    def full():
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", full)
    with pytest.raises(errors.DeviceOutOfMemory, match="Tried to allocate"), cpu.faults():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    "raised", [RuntimeError("shape mismatch"), ValueError("no"), errors.AttemptCancelled()]
)
def test_other_exceptions_pass_unchanged(cpu, raised):
    with pytest.raises(type(raised)) as caught, cpu.faults():
        raise raised
    assert caught.value is raised


def test_memory_that_no_machine_has_is_too_little_memory(cpu):
    """What torch really raises, so that a new wording is noticed."""
    with pytest.raises(errors.DeviceOutOfMemory), cpu.faults():
        torch.empty(2**60, dtype=torch.uint8)


def test_a_cpu_computes_in_full_precision_unless_told(monkeypatch):
    monkeypatch.setenv("RUSHES_DEVICE", "cpu")
    assert device.current(WorkerSettings()).dtype is torch.float32
    monkeypatch.setenv("RUSHES_DTYPE", "bfloat16")
    assert device.current(WorkerSettings()).dtype is torch.bfloat16


@pytest.fixture
def products():
    """How fp32 is multiplied on a GPU: as it was, after the test."""
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    yield kinds
    for kind, allow_tf32 in zip(kinds, before, strict=True):
        kind.allow_tf32 = allow_tf32


def test_what_fp32_means_on_a_gpu_is_not_left_to_libraries(products, monkeypatch):
    monkeypatch.setenv("RUSHES_DEVICE", "cpu")
    convolutions, matrices = products
    convolutions.allow_tf32 = False
    torch.set_float32_matmul_precision("high")
    device.current(WorkerSettings())
    assert convolutions.allow_tf32
    assert not matrices.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"  # torch.compile asks for it


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_fault_with_advice(monkeypatch):
    monkeypatch.setenv("RUSHES_DEVICE", "cuda")
    advice = rf"nvidia-smi and the driver, .* torch's CUDA \({torch.version.cuda}\)"
    with pytest.raises(errors.DeviceFault, match=advice):
        device.current(WorkerSettings())


def test_the_description_names_device_precision_and_torch(cpu):
    told = cpu.description()
    assert told == {"device": "CPU test", "dtype": "float32", "torch": torch.__version__}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_small_pieces_that_were_dropped_go_back_to_the_machine(cpu):
    pieces = [torch.ones(16_000) for _ in range(2_000)]
    is_above_them = torch.ones(16_000)
    held = host_memory.process_bytes()
    pieces_bytes = sum(piece.nbytes for piece in pieces)
    pieces.clear()
    cpu.give_up_caches()
    assert held - host_memory.process_bytes() > pieces_bytes // 2
    del is_above_them


def test_tables_of_sizes_that_may_not_come_again_are_given_up(cpu):
    rope.table((1, 2, 2), 12, cpu.torch_device, torch.float32)
    cpu.give_up_caches()
    assert rope.table.cache_info().currsize == 0
