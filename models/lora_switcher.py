"""Gives a network the LoRAs of the job at hand, and takes them out again bit for bit."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models import errors, lora, offload, stamps
from models.quantization import QuantizedLinear


@dataclass(frozen=True, kw_only=True, order=True)
class Choice:
    """A LoRA that a job asks for."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"the strength of {self.path} must be a number, got {self.strength}")


Pristine = Callable[[str], Tensor]
"""Native name -> the parameter as it is stored, on the CPU."""


class LoraSwitcher:
    """Gives one network the LoRAs of the job at hand; its weights depend on the last call only.

    Weights are merged in fp32 (fp64 stays fp64) from the untouched ones and rounded once. These
    come from `pristine`, which reads them again; without it, what a LoRA changes is kept as it was
    loaded in the memory of the host: for a LoRA on every matrix of a 14B model in bf16 another
    28 GB, pinned if the network is on CUDA. On quantized weights a LoRA runs
    beside them (see `QuantizedLinear`). Not for use during a forward.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device | str | None = None,
        pristine: Pristine | None = None,
    ) -> None:
        """`device` is where merging computes; by default where each parameter is."""
        self._parameters = dict(network.named_parameters())
        self._quantized = {
            f"{name}.weight": layer
            for name, layer in network.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        self._device = device
        self._pristine = pristine
        self._kept: dict[str, Tensor] = {}
        self._changed: frozenset[str] = frozenset()
        self._loras: dict[stamps.Stamp, lora.Lora] = {}
        self._applied: tuple[tuple[stamps.Stamp, float], ...] | None = ()

    @property
    def kept_bytes(self) -> int:
        """Memory that the untouched copies take."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def apply(self, choices: Sequence[Choice]) -> bool:
        """Make the network that of these LoRAs and no others; none restores it bit for bit.

        False: it was already.

        The order of the choices does not matter, a strength of 0 leaves a LoRA out. Raises
        CheckpointError before anything is changed.
        """
        request = tuple((_stamp(choice.path), choice.strength) for choice in sorted(choices))
        self._loras = {stamp: self._read(stamp) for stamp, _ in request}
        request = tuple((stamp, strength) for stamp, strength in request if strength)
        if request == self._applied:
            return False
        wanted = {name for stamp, _ in request for name in self._loras[stamp].parameters}
        self._keep(wanted)
        # Until all is done, this is neither the old state nor the new one.
        self._applied, self._changed = None, self._changed | wanted
        for name in sorted(self._changed):
            self._set(name, [(self._loras[stamp], strength) for stamp, strength in request])
        self._applied, self._changed = request, frozenset(wanted)
        return True

    def check(self) -> None:
        """Raises CheckpointError where a file that was applied is gone or is another one now."""
        for stamp, _ in self._applied or ():
            if _stamp(stamp.path) != stamp:
                raise errors.WeightsChangedError(stamp.path)

    def _read(self, stamp: stamps.Stamp) -> lora.Lora:
        if stamp in self._loras:
            return self._loras[stamp]
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        return lora.read(stamp.path, shapes)

    def _keep(self, names: Iterable[str]) -> None:
        if self._pristine is not None:
            return
        new = sorted(set(names) - self._kept.keys() - self._quantized.keys())
        self._kept |= _host_copies({name: self._parameters[name] for name in new})

    def _set(self, name: str, loras: Iterable[tuple[lora.Lora, float]]) -> None:
        touching = [(each, strength) for each, strength in loras if name in each.parameters]
        if name in self._quantized:
            _run_beside(self._quantized[name], name, touching, self._device)
            return
        parameter = self._parameters[name]
        untouched = self._kept[name] if self._pristine is None else self._pristine(name)
        untouched = untouched.to(parameter.dtype)  # as it was loaded: from there it is merged
        if touching:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            # Between host and device in the narrow dtype: in one step torch converts on the host.
            untouched = untouched.to(self._device or parameter.device).to(wide)
            # The differences are summed before the weight: two LoRAs commute bit for bit.
            total = torch.zeros_like(untouched)
            for each, strength in touching:
                total += each.delta(name, untouched) * strength
            untouched = (untouched + total).to(parameter.dtype)
        parameter.data.copy_(untouched)


def _host_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in few stretches of host memory, pinned for parameters on CUDA."""
    copies: dict[str, Tensor] = {}
    names = list(parameters)
    sizes = [offload.aligned_bytes(parameters[name]) for name in names]
    on_cuda = (parameter.device for parameter in parameters.values() if parameter.is_cuda)
    for place, home in offload.homes(sizes, next(on_cuda, torch.device("cpu"))):
        parameter = parameters[names[place]]
        copy = home[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        copies[names[place]] = copy.copy_(parameter.detach())
    return copies


def _run_beside(
    layer: QuantizedLinear,
    name: str,
    loras: Sequence[tuple[lora.Lora, float]],
    device: torch.device | str | None,
) -> None:
    """All pairs side by side as one, strengths in `up`; whole differences as one matrix."""
    dtype = layer.bias.dtype if layer.bias is not None else torch.bfloat16
    target = device or layer.weight.device
    downs, ups, dense = [], [], None
    for each, strength in loras:
        if name in each.pairs:
            pair = each.pairs[name]
            downs.append(pair.down.to(target).float())
            ups.append(pair.up.to(target).float() * (pair.scale * strength))
        for delta in each.deltas.get(name, ()):
            dense = delta.to(target).float() * strength + (0 if dense is None else dense)
    layer.lora_down = torch.cat(downs).to(dtype) if downs else None
    layer.lora_up = torch.cat(ups, dim=1).to(dtype) if ups else None
    layer.lora_dense = dense.to(dtype) if dense is not None else None


def _stamp(path: Path) -> stamps.Stamp:
    try:
        return stamps.of(path)
    except OSError as error:
        raise errors.MissingFileError(path.parent, f"the LoRA {path.name}") from error
