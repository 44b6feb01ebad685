"""Which kernel computes attention: a policy over what a machine has, and the name of what ran."""

import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

from models import attention
from models.attention import Machine

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


@pytest.fixture(autouse=True)
def as_it_was():
    before = attention._kernel
    yield
    attention.use(before)


@pytest.mark.parametrize(
    ("capability", "cudnn", "first", "warns"),
    [
        ((9, 0), 91501, CUDNN, False),
        ((9, 0), 91900, CUDNN, False),
        ((10, 0), 91501, CUDNN, False),
        ((9, 0), 91500, FLASH, True),
        ((9, 0), 90100, FLASH, True),
        ((9, 0), None, FLASH, True),
        ((8, 9), 91900, FLASH, False),
        ((8, 0), 90100, FLASH, False),
    ],
)
def test_cudnn_computes_where_it_is_fast_and_right(capability, cudnn, first, warns):
    choice = attention.choose(Machine(capability=capability, cudnn=cudnn))
    assert choice.backends[0] is first
    assert (CUDNN in choice.backends) == (first is CUDNN), "no fallback to a kernel that is wrong"
    assert (choice.warning is not None) == warns


def test_without_cuda_torch_chooses():
    assert attention.choose(Machine(capability=None, cudnn=None)) == attention.Choice()


def qkv():
    return torch.randn(3, 1, 6, 2, 8).unbind()


def test_the_kernel_that_ran_is_known_by_name():
    attention.use(attention.TorchKernels())
    assert attention.names() == []
    expected = attention.attend(*qkv()).shape
    assert expected == (1, 6, 2, 8)
    assert attention.names() == ["torch flash"]
    attention.use(attention.TorchKernels([SDPBackend.MATH]))
    attention.attend(*qkv())
    assert attention.names() == ["torch math"]


def test_every_kernel_of_torch_computes_the_same():
    inputs = qkv()
    flash, math = (
        attention.TorchKernels([backend])(*inputs) for backend in (FLASH, SDPBackend.MATH)
    )
    assert torch.allclose(flash, math, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "module", "function", "answer"),
    [
        ("flash3", "flash_attn_interface", "flash_attn_func", lambda out: (out, None)),
        ("flash3", "flash_attn_interface", "flash_attn_func", lambda out: out),
        ("flash4", "flash_attn.cute", "flash_attn_func", lambda out: (out, None)),
        ("sage", "sageattention", "sageattn", lambda out: out),
    ],
)
def test_an_installed_package_can_take_its_place(name, module, function, answer, monkeypatch):
    """A stand-in: the packages themselves need a GPU."""
    called = []

    def kernel(q, k, v, **options):
        called.append(options)
        return answer(attention.TorchKernels()(q, k, v))

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: kernel}))
    inputs = qkv()
    expected = attention.attend(*inputs)
    attention.use(attention.OtherKernel(name))
    assert torch.equal(attention.attend(*inputs), expected)
    assert called == [{"tensor_layout": "NHD"} if name == "sage" else {}]
    assert attention.names() == [f"{module}.{function}"]


def test_a_package_that_is_missing_is_an_import_error():
    with pytest.raises(ImportError):
        attention.OtherKernel("sage")


def test_kernels_are_tried_in_the_order_that_was_chosen(monkeypatch):
    asked, real = [], attention.sdpa_kernel

    def note(backends, **options):
        asked.append((backends, options))
        return real(backends, **options)

    monkeypatch.setattr(attention, "sdpa_kernel", note)
    order = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    attention.TorchKernels(order)(*torch.zeros(3, 1, 2, 1, 8))
    assert asked == [(order, {"set_priority": True})]
