"""Quantized transformers: 8-bit weights with scales, as LightX2V and ComfyUI publish them.

    LightX2V    {name}.weight  float8_e4m3fn or int8, [out, in]
                {name}.weight_scale  fp32 [out, 1]: the row's largest value / 448 or / 127
    ComfyUI     {name}.weight  float8_e4m3fn; {name}.scale_weight  one number for the tensor;
                an empty marker `scaled_fp8` somewhere in the file; perhaps {name}.scale_input.
                Newer: {name}.weight_scale and {name}.input_scale, {name}.comfy_quant in JSON

Which of them a file is follows from its tensors. Both become a `QuantizedLinear`.
"""

# B batch, L tokens, I in features, O out features, R rank of a LoRA

import enum
import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import errors, fp8, quantized_names, transformer
from models.quantized_names import CHANNEL_SCALE, INPUT_SCALES, MARKER

QUANTIZED_PARTS = ("self_attn", "cross_attn", "ffn")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}
"""In safetensors' words."""


class Scheme(enum.Enum):
    FP8 = "fp8"
    """float8_e4m3fn; the activations may be quantized too, token by token."""
    INT8 = "int8"
    """Symmetric integers; only the stored weights are small, they are computed with in bf16."""

    @property
    def dtype(self) -> torch.dtype:
        return {Scheme.FP8: torch.float8_e4m3fn, Scheme.INT8: torch.int8}[self]

    @property
    def largest(self) -> float:
        return {Scheme.FP8: fp8.LARGEST, Scheme.INT8: 127.0}[self]


CODE_DTYPES = tuple(scheme.dtype for scheme in Scheme)


class Matmul(enum.Enum):
    """How a quantized layer computed its last product."""

    FP8 = "fp8"
    """In fp8 with one scale per token and per output channel."""
    DEQUANTIZED = "dequantized"
    """In the input's dtype, the weight made whole for the moment."""


class QuantizedLinear(fp8.Linear):
    """A Linear with 8-bit weights. A LoRA runs beside them: y += (x down^T) up^T + x dense^T."""

    weight_scale: Tensor
    lora_down: Tensor | None
    lora_up: Tensor | None
    lora_dense: Tensor | None

    def __init__(self, like: nn.Linear, scheme: Scheme, scale_shape: tuple[int, ...]) -> None:
        """An empty layer on `meta` in place of `like`."""
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scheme = scheme
        self.is_wide = isinstance(like, transformer.WideLinear)
        self.may_use_fp8_matmul = True
        self.last_matmul: Matmul | None = None
        codes = torch.empty_like(like.weight, dtype=scheme.dtype, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = like.bias
        self.register_buffer("weight_scale", torch.empty(scale_shape, device="meta"))
        for name in ("lora_down", "lora_up", "lora_dense"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: fp8.Tokens) -> Tensor:
        if isinstance(x, Tensor) and self.computes_in_fp8(x):
            x = fp8.coded(x, fp8.Form.BOTH if self.has_lora else fp8.Form.CODES)
        if isinstance(x, Tensor):
            return self._dequantized(transformer.widen(x) if self.is_wide else x)
        self.last_matmul = Matmul.FP8
        y_BLO = fp8.product(x, self.weight, self.weight_scale, self.bias)
        if not self.has_lora:
            return y_BLO
        assert x.whole is not None, "a LoRA computes with the tokens themselves"
        return y_BLO + self._lora(x.whole)

    def _dequantized(self, x_BLI: Tensor) -> Tensor:
        self.last_matmul = Matmul.DEQUANTIZED
        weight_OI = dequantize(self.weight, self.weight_scale, x_BLI.dtype)
        bias_O = None if self.bias is None else self.bias.to(x_BLI.dtype)
        y_BLO = functional.linear(x_BLI, weight_OI, bias_O)
        return y_BLO + self._lora(x_BLI) if self.has_lora else y_BLO

    @property
    def has_lora(self) -> bool:
        return self.lora_down is not None or self.lora_dense is not None

    def _lora(self, x_BLI: Tensor) -> Tensor:
        parts = []
        if self.lora_down is not None and self.lora_up is not None:
            x_BLR = functional.linear(x_BLI, self.lora_down.to(x_BLI.dtype))
            parts.append(functional.linear(x_BLR, self.lora_up.to(x_BLI.dtype)))
        if self.lora_dense is not None:
            parts.append(functional.linear(x_BLI, self.lora_dense.to(x_BLI.dtype)))
        return functools.reduce(torch.add, parts)

    def computes_in_fp8(self, x_BLI: Tensor) -> bool:
        features = (self.in_features, self.out_features)
        return (
            self.may_use_fp8_matmul
            and self.scheme is Scheme.FP8
            and x_BLI.dtype == torch.bfloat16
            and not self.is_wide
            and not any(count % fp8.MULTIPLE for count in features)
            and fp8.has_product(x_BLI.device)
        )


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, rounded once to `dtype`."""
    wide = transformer.widened(dtype)
    return (codes.to(wide) * scale.to(wide)).to(dtype)


def quantize(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, 1] in fp32: each row's largest value takes the last code."""
    scale_O1 = fp8.row_scale(weight_OI, scheme.largest)
    return encode(weight_OI, scale_O1, scheme), scale_O1


def encode(values: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    if scheme is Scheme.FP8:
        return fp8.encode(values, scale)
    codes = (values.float() / scale).round()
    return codes.clamp(-scheme.largest, scheme.largest).to(scheme.dtype)


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """The matrices of a block: only 2-D weights of its attentions and its feed-forward net."""
    parts = name.split(".")
    return (
        len(shape) == 2 and len(parts) > 3 and parts[2] in QUANTIZED_PARTS and parts[-1] == "weight"
    )


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)
    }


def last_matmuls(network: nn.Module) -> Counter[Matmul | None]:
    """How many quantized layers computed how: shows whether fp8 kernels really ran."""
    return Counter(layer.last_matmul for layer in quantized_layers(network).values())


def allow_fp8_matmul(network: nn.Module, allowed: bool) -> None:
    """Without it weights are dequantized also where fp8 is fast: slower, activations unrounded."""
    for layer in quantized_layers(network).values():
        layer.may_use_fp8_matmul = allowed


def prepare(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Make a network on `meta` fit a file's quantized tensors; return these and their dtypes.

    A file without any is handed back as it is. Both forms of scale come back as `weight_scale`;
    those of activations are left out.
    Raises QuantizedWeightsError for mixed schemes and for codes without scales.
    """
    found = quantized_names.inspect(
        {name: DTYPE_NAMES.get(tensor.dtype, "") for name, tensor in tensors.items()}, path
    )
    if found is None:
        return dict(tensors), {}
    loaded = {name: tensor for name, tensor in tensors.items() if name != MARKER}
    dtypes: dict[str, torch.dtype] = {}
    scheme = next(scheme for scheme in Scheme if DTYPE_NAMES[scheme.dtype] == found.dtype)
    for weight in found.weights:
        module = weight.removesuffix(".weight")
        scale = _as_2d(loaded.pop(module + found.scale_ending))
        loaded[module + CHANNEL_SCALE] = scale
        for ending in INPUT_SCALES:
            loaded.pop(module + ending, None)
        dtypes |= {weight: scheme.dtype, module + CHANNEL_SCALE: torch.float32}
        _check_scale(scale, rows=loaded[weight].shape[0], name=weight, path=path)
        _replace(network, module, scheme, tuple(scale.shape), path)
    return loaded, dtypes


def _as_2d(scale: Tensor) -> Tensor:
    """ComfyUI's one number, or LightX2V's column, as rows by one."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale


def _check_scale(scale: Tensor, *, rows: int, name: str, path: Path) -> None:
    if tuple(scale.shape) not in {(rows, 1), (1, 1)}:
        shape = list(scale.shape)
        problem = f"has scales of shape {shape}, expected [{rows}, 1] or a single one"
        raise errors.QuantizedWeightsError(path, problem, names=[name])
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        problem = "has scales that are not positive numbers"
        raise errors.QuantizedWeightsError(path, problem, names=[name])


def _replace(
    network: nn.Module, name: str, scheme: Scheme, scale_shape: tuple[int, ...], path: Path
) -> None:
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = network.get_submodule(parent_name)
        layer = getattr(parent, leaf)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        problem = "quantizes what is no linear layer of this network"
        raise errors.QuantizedWeightsError(path, problem, names=[name])
    setattr(parent, leaf, QuantizedLinear(layer, scheme, scale_shape))
