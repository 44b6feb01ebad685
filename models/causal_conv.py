"""3-D convolution that sees only the past, over a video that comes in chunks."""

# B batch, C channels, T frames, H W rows columns, P frames from before the chunk, N pixels

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import fusion, norms
from models.norms import ChannelRMSNorm

PIECE_BYTES = 2**24  # of what only lies between two kernels: a GPU's cache holds it

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's stub


class FrameCache:
    """The last input frames of each causal convolution, from one chunk of a video to the next.

    One cache belongs to one pass over one video. What lies before the first frame is zero. `rows`
    are convolutions that will be given one frame in turn, of one size, in this order: the frames of
    each row lie in one buffer, which is what makes large frames affordable.
    """

    def __init__(self, rows: Iterable[Sequence["CausalConv3d"]] = ()) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()
        self._belts: dict[nn.Module, _Belt] = {}
        self._made: dict[nn.Module, Tensor] = {}
        for row in rows:
            self._belts |= dict.fromkeys(row, _Belt(row))

    def starts(self, layer: nn.Module) -> bool:
        """True the first time a layer asks: the first chunk has one frame and no stride in time."""
        if layer in self._started:
            return False
        self._started.add(layer)
        return True

    def repeated(
        self,
        layer: nn.Module,
        make: Callable[[], Tensor],
        *,
        still: int,
        num_frames: int,
        num_past: int,
    ) -> Tensor:
        """What a layer makes of a chunk, or made of the one before where that has the same bits.

        `still` frames before the chunk's last one are equal to it, and so are all that come; the
        layer's window is `num_past` frames longer than one. A chunk is as long as the one before.
        """
        spare = still - (2 * num_frames - 1) - num_past
        if spare >= 0 and layer in self._made:
            return self._made[layer]
        made = make()
        if spare + num_frames >= 0:  # the next chunk's output will be this one
            self._made[layer] = made
        return made

    def remember(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> None:
        # A clone: a view would keep the whole chunk in memory.
        self._frames[layer] = x_BCTHW[:, :, -num_frames:].clone()

    def with_past(
        self, layer: "CausalConv3d", x_BCTHW: Tensor, act: "Activation", *, trains: bool
    ) -> Tensor:
        """The layer's last input frames, then `act` of `x`; remembers its new last ones.

        Channels last. Where gradients are wanted nothing is written over; else the frames of a
        layer that is in a row are good until the next call. Of the first frame alone nothing may
        lie before it: the layer leaves out what it has for zeros.
        """
        if trains:
            return self._joined(layer, act(x_BCTHW))
        if layer in self._belts:
            seen_BCTHW = self._belts[layer].advance(layer, x_BCTHW)
        else:
            seen_BCTHW = self._window(x_BCTHW, self._frames.get(layer), layer.num_past_frames)
        chunk_BCTHW = seen_BCTHW[:, :, layer.num_past_frames :]
        act.write(x_BCTHW, chunk_BCTHW)
        if layer not in self._belts:
            self.remember(layer, seen_BCTHW, layer.num_past_frames)
        return chunk_BCTHW if self.starts(layer) and _skips_zeros(chunk_BCTHW) else seen_BCTHW

    def add_up(self, layer: "CausalConv3d", parts_KBOHW: Tensor) -> Tensor:
        """This frame's output [B, O, H, W]: its own part and what earlier frames had for it.

        `parts` are what the frame adds to outputs to come, the last of these first, its own last.
        Those of others are kept, which for few output channels is far less than frames are.
        """
        own, *others = reversed(parts_KBOHW.unbind())
        waiting = self._frames.get(layer)
        if waiting is None:
            waiting = torch.zeros_like(parts_KBOHW[1:])
        ours, *theirs = waiting.unbind()
        # Of the output furthest off nothing is known yet.
        theirs.append(torch.zeros_like(ours))
        self._frames[layer] = torch.stack(
            [part + before for part, before in zip(others, theirs, strict=True)]
        )
        return own + ours

    def _joined(self, layer: "CausalConv3d", x_BCTHW: Tensor) -> Tensor:
        past_BCPHW = self._frames.get(layer)
        if past_BCPHW is None:
            joined_BCTHW = functional.pad(x_BCTHW, (0, 0, 0, 0, layer.num_past_frames, 0))
        else:
            joined_BCTHW = torch.cat([past_BCPHW, x_BCTHW], dim=2)
        self.remember(layer, joined_BCTHW, layer.num_past_frames)
        return joined_BCTHW

    def _window(self, x_BCTHW: Tensor, past_BCPHW: Tensor | None, num_past: int) -> Tensor:
        """The past, and room for the chunk."""
        window_BCTHW = _room_for(x_BCTHW, num_past + x_BCTHW.shape[2])
        if past_BCPHW is None:
            window_BCTHW[:, :, :num_past].zero_()
        else:
            window_BCTHW[:, :, :num_past].copy_(past_BCPHW)
        return window_BCTHW


class _Belt:
    """The past of convolutions that take turns, in a buffer with a single place to spare.

        | past of the last | ... | past of the second | past of the first | free |

    The first one's new frame goes into the free place, right behind its past. Its oldest frame is
    not needed any more, and that place is right behind the past of the second; and so on. After the
    last one's turn the free place is in front, and everything moves towards it by one.
    """

    def __init__(self, layers: Sequence["CausalConv3d"]) -> None:
        (self._num_past,) = {layer.num_past_frames for layer in layers}
        self._turns = {layer: turn for turn, layer in enumerate(layers)}
        self._next_turn = 0
        self._places_BCTHW: Tensor | None = None

    def advance(self, layer: "CausalConv3d", frame_BC1HW: Tensor) -> Tensor:
        """The layer's past and room for its new frame."""
        turn, past = self._turns[layer], self._num_past
        assert frame_BC1HW.shape[2] == 1, "one frame at a time"
        assert turn == self._next_turn, "in this order"
        self._next_turn = (turn + 1) % len(self._turns)
        num_places = past * len(self._turns) + 1
        if self._places_BCTHW is None:
            self._places_BCTHW = _room_for(frame_BC1HW, num_places).zero_()
        elif turn == 0:
            for place in range(num_places - 1):
                self._places_BCTHW[:, :, place].copy_(self._places_BCTHW[:, :, place + 1])
        end = num_places - past * turn
        return self._places_BCTHW[:, :, end - past - 1 : end]


def frames_like(x: Tensor, shape_BCTHW: tuple[int, int, int, int, int]) -> Tensor:
    """Room for frames of another shape, channels last."""
    batch, channels, frames, height, width = shape_BCTHW
    return x.new_empty(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def _room_for(x_BCTHW: Tensor, num_frames: int) -> Tensor:
    batch, channels, _, height, width = x_BCTHW.shape
    return frames_like(x_BCTHW, (batch, channels, num_frames, height, width))


@dataclass(frozen=True)
class Activation:
    """What lies between two convolutions: SiLU(norm(x + bias)), or less of it."""

    norm: ChannelRMSNorm | None = None
    """None: nothing at all."""
    bias_C: Tensor | None = None  # noqa: N815  # named by its axes, as everywhere
    """Of the convolution before, where it is still to be added."""

    def __call__(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self._with_bias(x_BCTHW)
        return x_BCTHW if self.norm is None else functional.silu(self.norm(x_BCTHW))

    def _with_bias(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW if self.bias_C is None else x_BCTHW + self.bias_C.view(-1, 1, 1, 1)

    def write(self, x_BCTHW: Tensor, out_BCTHW: Tensor) -> None:
        """To where it is wanted; no whole frame lies between norm and SiLU."""
        if self.norm is None:
            out_BCTHW.copy_(self(x_BCTHW))
        elif fusion.chains_are_compiled():
            gamma_C = self.norm.gamma.flatten()
            # Of several videos the places that are written to do not lie side by side.
            for x, out in zip(torch.split(x_BCTHW, 1), torch.split(out_BCTHW, 1), strict=True):
                _write(pixels(x), self.bias_C, gamma_C, pixels_to_write(out))
        else:
            for piece, room in _pieces(x_BCTHW, out_BCTHW):
                torch.ops.aten.silu.out(self.norm(self._with_bias(piece)), out=room)


@fusion.chain_of_rows
def _write(x_NC: Tensor, bias_C: Tensor | None, gamma_C: Tensor, out_NC: Tensor) -> None:
    x_NC = x_NC if bias_C is None else x_NC + bias_C
    out_NC.copy_(functional.silu(norms.over_channels(x_NC, gamma_C)))


def pixels(x: Tensor) -> Tensor:
    """[pixels, C] of frames or images; a view where channels lie last."""
    return x.movedim(1, -1).flatten(0, -2)


def pixels_to_write(x: Tensor) -> Tensor:
    """The same, and always a view: what is written to them is written to `x`."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _pieces(x_BCTHW: Tensor, out_BCTHW: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of a frame at a time, of both."""
    frames = (torch.split(x, 1, dim=2) for x in (x_BCTHW, out_BCTHW))
    for frame, target in zip(*frames, strict=True):
        num_rows = max(1, PIECE_BYTES // (frame.nbytes // frame.shape[3]))
        yield from zip(*(torch.split(x, num_rows, dim=3) for x in (frame, target)), strict=True)


NOTHING = Activation()


class Chunked(nn.Module):
    """A module that is given a video chunk by chunk: `forward(x_BCTHW, cache)`."""


class CausalConv3d(nn.Conv3d):
    """Conv3d whose window ends at the frame it computes; rows and columns are padded to keep size.

    It needs `kernel - stride` frames from before the chunk, which the cache keeps. `see` puts them
    before the chunk, and the layer itself convolves what is seen.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        _, rows, columns = kernel_size
        padding = (0, rows // 2, columns // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.num_past_frames = kernel_size[0] - stride[0]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _skips_zeros(x):
            weight = weight[:, :, -1:]
        if not _is_for_onednn(x) or self.trains(x):
            own: Tensor = super()._conv_forward(x, weight, bias)
            return own
        assert not isinstance(self.padding, str)
        y: Tensor = torch.mkldnn_convolution(
            x, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )
        return y

    def trains(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    def see(self, x_BCTHW: Tensor, cache: FrameCache, act: Activation = NOTHING) -> Tensor:
        """The past, and `act` of the chunk. No need to keep the chunk."""
        if self.num_past_frames:
            return cache.with_past(self, x_BCTHW, act, trains=self.trains(x_BCTHW))
        return act(x_BCTHW)

    def of_chunk(self, x_BCTHW: Tensor, cache: FrameCache, act: Activation = NOTHING) -> Tensor:
        """Convolve `act` of the chunk."""
        convolved: Tensor = self(self.see(x_BCTHW, cache, act))
        return convolved

    def without_bias(self, seen_BCTHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and its bias if a chain is to add it: cuDNN adds it in another pass.

        Without the module's hooks then.
        """
        if self.bias is None or not fusion.chains_are_compiled() or self.trains(seen_BCTHW):
            return self(seen_BCTHW), None
        convolved_BCTHW = self._conv_forward(seen_BCTHW, self.weight, None)
        return convolved_BCTHW.contiguous(memory_format=torch.channels_last_3d), self.bias


def _skips_zeros(x_BCTHW: Tensor) -> bool:
    """A third of the work for a first frame. On a GPU, where it is little of a video, untried."""
    return x_BCTHW.shape[2] == 1 and x_BCTHW.is_cpu and not torch.compiler.is_compiling()


def _is_for_onednn(x: Tensor) -> bool:
    """On a processor torch has small inputs convolved by a way of its own, three times as slow.

    Asked directly, oneDNN is not counted by torch's counter of FLOPs.
    """
    is_plain = x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return is_plain and HAS_ONEDNN
