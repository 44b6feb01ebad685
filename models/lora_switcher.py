"""Gives a network the LoRAs of the job at hand, and takes them out again bit for bit."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models import errors, lora, memory, offload, read_ahead
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
        self._loras: dict[_Stamp, lora.Lora] = {}
        self._applied: tuple[tuple[_Stamp, float], ...] | None = ()

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
        loras = [(self._loras[stamp], strength) for stamp, strength in request]
        for name in sorted(self._changed & self._quantized.keys()):
            _run_beside(self._quantized[name], name, _touching(name, loras), self._device)
        names = sorted(self._changed - self._quantized.keys())
        with contextlib.closing(self._untouched(names)) as untouched:
            for name, weight in zip(names, untouched, strict=True):
                self._set(name, weight, _touching(name, loras))
        self._applied, self._changed = request, frozenset(wanted)
        return True

    def check(self) -> None:
        """Raises CheckpointError where a file that was applied is gone or is another one now."""
        for stamp, _ in self._applied or ():
            if _stamp(stamp.path) != stamp:
                raise errors.WeightsChangedError(stamp.path)

    def _read(self, stamp: "_Stamp") -> lora.Lora:
        if stamp in self._loras:
            return self._loras[stamp]
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        return lora.read(stamp.path, shapes)

    def _keep(self, names: Iterable[str]) -> None:
        if self._pristine is not None:
            return
        new = sorted(set(names) - self._kept.keys() - self._quantized.keys())
        self._kept |= _host_copies({name: self._parameters[name] for name in new})

    def _untouched(self, names: Sequence[str]) -> Generator[Tensor, None, None]:
        """Each parameter as it was loaded, on the host: from there it is merged."""
        if self._pristine is None:
            yield from (self._kept[name] for name in names)
        else:
            yield from read_ahead.in_order(self._read_again, names)

    def _read_again(self, name: str) -> Tensor:
        assert self._pristine is not None
        # A copy, so that the reader waits for the file, and not who uses it.
        return self._pristine(name).to(self._parameters[name].dtype, copy=True)

    def _set(self, name: str, untouched: Tensor, loras: "_Loras") -> None:
        parameter = self._parameters[name]
        if loras:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            # Between host and device in the narrow dtype: torch would convert on the host.
            untouched = untouched.to(self._device or parameter.device).to(wide)
            # The differences are summed before the weight: two LoRAs commute bit for bit.
            total = torch.zeros_like(untouched)
            for each, strength in loras:
                total += each.delta(name, untouched) * strength
            untouched = (untouched + total).to(parameter.dtype)
        parameter.data.copy_(untouched)


_Loras = Sequence[tuple[lora.Lora, float]]
"""With their strengths."""


def _touching(name: str, loras: _Loras) -> _Loras:
    return [(each, strength) for each, strength in loras if name in each.parameters]


def _host_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in few stretches of host memory, pinned for parameters on CUDA."""
    copies: dict[str, Tensor] = {}
    names = list(parameters)
    sizes = [offload.aligned_bytes(parameters[name]) for name in names]
    for places in memory.stretches(sizes):
        device = parameters[names[places[0]]].device
        free = offload.host_bytes(sum(sizes[place] for place in places), device)
        for place in places:
            parameter = parameters[names[place]]
            copy = free[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            copies[names[place]] = copy.copy_(parameter.detach())
            free = free[sizes[place] :]
    return copies


def _run_beside(
    layer: QuantizedLinear,
    name: str,
    loras: _Loras,
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


@dataclass(frozen=True, order=True)
class _Stamp:
    """A file as it is now: one that was replaced is another."""

    path: Path
    num_bytes: int
    changed_ns: int


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise errors.MissingFileError(path.parent, f"the LoRA {path.name}") from error
    return _Stamp(path, status.st_size, status.st_mtime_ns)
