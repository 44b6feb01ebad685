"""3-D convolution that sees only the past, over a video that comes in chunks."""

# B batch, C channels, T frames, H W rows columns, P frames from before the chunk

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrameCache:
    """The last input frames of each causal convolution, from one chunk of a video to the next.

    One cache belongs to one pass over one video. What lies before the first frame is zero. What a
    convolution sees, its past and the chunk, is put together in one buffer that all of them share,
    channels last; where gradients are wanted each gets tensors of its own.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()
        self._buffer: Tensor | None = None

    def starts(self, layer: nn.Module) -> bool:
        """True the first time a layer asks: the first chunk has one frame and no stride in time."""
        if layer in self._started:
            return False
        self._started.add(layer)
        return True

    def remember(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> None:
        # A clone: a view would keep the whole chunk in memory, or change with the shared buffer.
        self._frames[layer] = x_BCTHW[:, :, -num_frames:].clone()

    def with_past(
        self,
        layer: nn.Module,
        x_BCTHW: Tensor,
        num_frames: int,
        *,
        norm: nn.Module | None,
        trains: bool,
    ) -> Tensor:
        """The layer's last `num_frames` input frames, then `x`; remembers its new last ones.

        With `norm` it is SiLU(norm(x)) that the layer sees. Good until the next call, unless it
        trains.
        """
        past_BCPHW = self._frames.get(layer)
        if trains:
            x_BCTHW = x_BCTHW if norm is None else functional.silu(norm(x_BCTHW))
            if past_BCPHW is None:
                joined_BCTHW = functional.pad(x_BCTHW, (0, 0, 0, 0, num_frames, 0))
            else:
                joined_BCTHW = torch.cat([past_BCPHW, x_BCTHW], dim=2)
        else:
            joined_BCTHW = self._window(x_BCTHW, num_frames)
            if past_BCPHW is None:
                joined_BCTHW[:, :, :num_frames].zero_()
            else:
                joined_BCTHW[:, :, :num_frames].copy_(past_BCPHW)
            chunk_BCTHW = joined_BCTHW[:, :, num_frames:]
            if norm is None:
                chunk_BCTHW.copy_(x_BCTHW)
            else:
                torch.ops.aten.silu.out(norm(x_BCTHW), out=chunk_BCTHW)
        self.remember(layer, joined_BCTHW, num_frames)
        return joined_BCTHW

    def _window(self, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        batch, channels, frames, height, width = x_BCTHW.shape
        shape = (batch, frames + num_frames, height, width, channels)
        size = torch.Size(shape).numel()
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None  # let go first: both need not fit
            self._buffer = x_BCTHW.new_empty(size)
        return self._buffer[:size].view(shape).permute(0, 4, 1, 2, 3)


class Chunked(nn.Module):
    """A module that is given a video chunk by chunk: `forward(x_BCTHW, cache)`."""


class CausalConv3d(nn.Conv3d, Chunked):
    """Conv3d whose window ends at the frame it computes; rows and columns are padded to keep size.

    It needs `kernel - stride` frames from before the chunk, which the cache keeps.
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

    # A convolution by its weights, not by its call: it needs the past frames as well.
    def forward(  # type: ignore[override]
        self, x_BCTHW: Tensor, cache: FrameCache, *, norm: nn.Module | None = None
    ) -> Tensor:
        """Convolve the chunk, or with `norm` SiLU(norm(chunk)), which is not kept meanwhile."""
        if self.num_past_frames:
            trains = torch.is_grad_enabled() and (
                x_BCTHW.requires_grad or self.weight.requires_grad
            )
            x_BCTHW = cache.with_past(self, x_BCTHW, self.num_past_frames, norm=norm, trains=trains)
        elif norm is not None:
            x_BCTHW = functional.silu(norm(x_BCTHW))
        return super().forward(x_BCTHW)
