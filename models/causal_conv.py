"""3-D convolution that sees only the past, over a video that comes in chunks."""

# B batch, C channels, T frames, H W rows columns

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrameCache:
    """The last input frames of each causal convolution, from one chunk of a video to the next.

    One cache belongs to one pass over one video. What lies before the first frame is zero.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()

    def starts(self, layer: nn.Module) -> bool:
        """True the first time a layer asks: the first chunk has one frame and no stride in time."""
        if layer in self._started:
            return False
        self._started.add(layer)
        return True

    def remember(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> None:
        # A clone: a view would keep the whole chunk in memory.
        self._frames[layer] = x_BCTHW[:, :, -num_frames:].clone()

    def with_past(self, layer: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Put the layer's last `num_frames` input frames before `x`, and remember its new last."""
        past = self._frames.get(layer)
        if past is None:
            joined = functional.pad(x_BCTHW, (0, 0, 0, 0, num_frames, 0))
        else:
            joined = torch.cat([past, x_BCTHW], dim=2)
        self.remember(layer, joined, num_frames)
        return joined


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
    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:  # type: ignore[override]
        if self.num_past_frames:
            x_BCTHW = cache.with_past(self, x_BCTHW, self.num_past_frames)
        return super().forward(x_BCTHW)
