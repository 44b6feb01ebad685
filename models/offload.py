"""Weights that live on the host and come to the device for their use: less memory, same numbers."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models import checkpoint, memory, transformer

ALIGNMENT = 256  # bytes; what CUDA's own allocations have
NUM_BUFFERS = 2  # one block computes while the next arrives


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a stretch of bytes."""

    tensor: Tensor
    start: int

    def view(self, stretch: Tensor) -> Tensor:
        dense = torch.empty_like(self.tensor, device="meta")
        assert dense.stride() == self.tensor.stride(), "a weight with gaps"
        stored = stretch[self.start : self.start + self.tensor.nbytes].view(self.tensor.dtype)
        return stored.as_strided(self.tensor.shape, self.tensor.stride())


class Parked:
    """Some tensors in one stretch of host memory, which may be longer than they need.

    The tensors stay the objects they were; `bind` makes them look into a copy of the stretch, and
    `release` back at home. Nothing is copied back: weights do not change on the device.
    """

    def __init__(self, tensors: Iterable[Tensor], home: Tensor) -> None:
        self._places, end = [], 0
        for tensor in tensors:
            self._places.append(_Place(tensor, end))
            end += aligned_bytes(tensor)
        self.num_bytes = end
        self.home = home[:end]
        self._at_home = self._views(self.home)
        for place, view in zip(self._places, self._at_home, strict=True):
            view.copy_(place.tensor)
        self.release()

    def bind(self, stretch: Tensor) -> None:
        for place, view in zip(self._places, self._views(stretch), strict=True):
            place.tensor.data = view

    def release(self) -> None:
        for place, view in zip(self._places, self._at_home, strict=True):
            place.tensor.data = view

    def _views(self, stretch: Tensor) -> list[Tensor]:
        # Views made in inference mode could not be written to outside of it, as a LoRA does.
        with torch.inference_mode(mode=False):
            return [place.view(stretch) for place in self._places]


def weights_of(network: nn.Module) -> list[Tensor]:
    """Parameters and stored buffers, each once however often it is tied."""
    stored = network.state_dict(keep_vars=True).values()
    return list({id(tensor): tensor for tensor in stored}.values())


def park(network: nn.Module, device: torch.device) -> list[Parked]:
    """Bring a network's weights home, in several stretches so that they never lie there twice."""
    weights = weights_of(network)
    sizes = [aligned_bytes(tensor) for tensor in weights]
    return [
        Parked(
            [weights[place] for place in places],
            host_bytes(sum(sizes[place] for place in places), device),
        )
        for places in memory.stretches(sizes)
    ]


def aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def host_bytes(count: int, device: torch.device) -> Tensor:
    """A stretch of host memory, uint8, pinned if the device is CUDA."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")


def homes(sizes: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Place -> so many bytes of host memory, in few allocations, each made when it is asked for."""
    for places in memory.stretches(sizes):
        free = host_bytes(sum(sizes[place] for place in places), device)
        for place in places:
            yield place, free[: sizes[place]]
            free = free[sizes[place] :]


@contextlib.contextmanager
def visit(parked: Sequence[Parked], device: torch.device) -> Iterator[None]:
    """The weights are on the device inside, and at home after."""
    try:
        for each in parked:
            each.bind(each.home.to(device, non_blocking=True, copy=True))
        yield
    finally:
        for each in parked:
            each.release()


class Copier(Protocol):
    """Copies from host to device, in order with what is computed in a buffer."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to fill a buffer, once nothing queued so far computes in it any more."""

    def wait(self, slot: int) -> None:
        """What is computed from now on waits until the buffer is full."""

    def done(self, slot: int) -> None:
        """What computes in the buffer is queued."""


class DirectCopier:
    """Without streams: each copy is done when it returns."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:  # noqa: ARG002
        target.copy_(source)

    def wait(self, slot: int) -> None:
        """The copy is done."""

    def done(self, slot: int) -> None:
        """So is the computing."""


class CudaCopier:
    """On a stream of its own, so that a block is copied while another computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        new_event: Any = torch.cuda.Event  # torch leaves both without types
        new_stream: Any = torch.cuda.Stream
        self._stream = new_stream(device)
        self._full = [new_event() for _ in range(NUM_BUFFERS)]
        self._free = [new_event() for _ in range(NUM_BUFFERS)]
        # The buffers may be memory that something queued earlier still reads.
        for slot in range(NUM_BUFFERS):
            self.done(slot)

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            target.copy_(source, non_blocking=True)
            self._full[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._full[slot])

    def done(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self._device))


class BlockStreamer:
    """Lets a transformer compute with two of its blocks on the device at a time.

    The block after the current one is copied meanwhile. The rest of the network is on the device.
    Each forward copies every block anew, so what a LoRA changed at home is what computes.
    """

    def __init__(
        self,
        network: transformer.WanTransformer,
        device: torch.device,
        *,
        copier: Copier | None = None,
    ) -> None:
        for name, child in network.named_children():
            if name != "blocks":
                child.to(device)
        self._parked = _park_blocks(network, device)
        size = max(each.num_bytes for each in self._parked)
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)
        ]
        is_cuda = device.type == "cuda"
        self._copier = copier or (CudaCopier(device) if is_cuda else DirectCopier())
        self._held: list[int | None] = [None] * NUM_BUFFERS
        for index, block in enumerate(network.blocks):
            self._hook(index, block)

    def _hook(self, index: int, block: nn.Module) -> None:
        block.register_forward_pre_hook(lambda *_: self._before(index))
        block.register_forward_hook(lambda *_: self._after(index), always_call=True)

    def _before(self, index: int) -> None:
        if index == 0:
            self._forget()
        self._fetch(index)
        slot = index % NUM_BUFFERS
        self._copier.wait(slot)
        self._parked[index].bind(self._buffers[slot])
        if index + 1 < len(self._parked):
            self._fetch(index + 1)

    def _after(self, index: int) -> None:
        """Also when the block raised: what is queued may still read the buffer."""
        slot = index % NUM_BUFFERS
        self._copier.done(slot)
        self._held[slot] = None
        self._parked[index].release()

    def _forget(self) -> None:
        """A forward that was broken off has left a block that nobody computed with."""
        self._held = [None] * NUM_BUFFERS

    def _fetch(self, index: int) -> None:
        slot = index % NUM_BUFFERS
        if self._held[slot] == index:
            return
        source = self._parked[index].home
        self._copier.copy(slot, self._buffers[slot][: source.numel()], source)
        self._held[slot] = index


def _park_blocks(network: transformer.WanTransformer, device: torch.device) -> list[Parked]:
    """Each block in one piece; several blocks share an allocation."""
    weights = [weights_of(block) for block in network.blocks]
    sizes = [sum(map(aligned_bytes, tensors)) for tensors in weights]
    parked = {place: Parked(weights[place], home) for place, home in homes(sizes, device)}
    return [parked[place] for place in range(len(weights))]


class Placement:
    """Puts loaded networks where a mode wants them, and brings each to the device for its use.

    Load them on the CPU, except for `Offload.NONE` without further options, which needs no
    placement. `with placement.using(networks.text_encoder): ...`; outside, only networks that stay
    on the device may be called. Changes to weights (LoRA) belong outside.
    """

    def __init__(
        self, networks: checkpoint.Networks, *, mode: memory.Mode, device: torch.device
    ) -> None:
        self.device = device
        self._parked: dict[nn.Module, list[Parked]] = {}
        self._devices: dict[nn.Module, torch.device] = {}
        self._streamers: list[BlockStreamer] = []
        for_encoders = mode.offload
        if mode.park_encoders and for_encoders is memory.Offload.NONE:
            for_encoders = memory.Offload.MODEL
        if mode.text_encoder_on_cpu:
            self._devices[networks.text_encoder.cpu()] = torch.device("cpu")
        else:
            self._put(networks.text_encoder, for_encoders)
        for network in vars(networks).values():
            if isinstance(network, transformer.WanTransformer):
                self._put_transformer(network, mode.offload)
            elif isinstance(network, nn.Module) and network is not networks.text_encoder:
                self._put(network, for_encoders)

    def _put(self, network: nn.Module, offload: memory.Offload) -> None:
        self._devices[network] = self.device
        if offload is memory.Offload.NONE:
            network.to(self.device)
        else:
            self._parked[network] = park(network.cpu(), self.device)

    def _put_transformer(
        self, network: transformer.WanTransformer, offload: memory.Offload
    ) -> None:
        if offload is not memory.Offload.BLOCK:
            self._put(network, offload)
            return
        self._devices[network] = self.device
        self._streamers.append(BlockStreamer(network, self.device))

    @contextlib.contextmanager
    def using(self, network: nn.Module) -> Iterator[torch.device]:
        """Yields the device that the network computes on: inputs go there."""
        with visit(self._parked.get(network, ()), self.device):
            yield self._devices[network]
