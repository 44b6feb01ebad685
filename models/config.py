"""Dimensions of the networks, and their named sizes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

WAN_TEXT_DIM = 4096  # width of UMT5-XXL; the native config.json leaves it out
WAN_TEXT_LEN = 512  # rows of context the model was trained with; diffusers' configs leave it out
WAN_IMAGE_DIM = 1280  # width of CLIP ViT-H; the native config.json leaves it out

WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def _require_positive(config: object, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Dimensions of the diffusion transformer; `image_dim` is set for image-to-video."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = WAN_TEXT_DIM
    text_len: int = WAN_TEXT_LEN
    image_dim: int | None = None
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        _require_positive(self, "dim ffn_dim num_heads num_layers in_dim out_dim text_dim text_len")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"head dim {self.head_dim} must be even and at least 6 for RoPE")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even and positive, got {self.freq_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along each axis of latents (C, T, H, W)."""
        _, frames, rows, columns = latent_shape
        per_frame, per_row, per_column = self.patch_size
        return frames // per_frame, rows // per_row, columns // per_column


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Dimensions of the causal video autoencoder, and the statistics that normalise its latents."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD

    def __post_init__(self) -> None:
        _require_positive(self, "base_dim z_dim num_res_blocks")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temporal_downsample needs one entry less than dim_mult")
        if not any(self.temporal_downsample):
            raise ValueError("temporal_downsample must be true somewhere: videos have latents")
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(f"latent mean and std need {self.z_dim} entries each")
        if min(self.latent_std) <= 0:
            raise ValueError("latent std must be positive")

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame after the first."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def spatial_stride(self) -> int:
        return int(2 ** len(self.temporal_downsample))

    def latent_shape(
        self, *, num_frames: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """(C, T, H, W) of a video's latents. Raises ValueError for sizes it cannot represent."""
        per_latent, per_pixel = self.temporal_stride, self.spatial_stride
        if num_frames < 1 or (num_frames - 1) % per_latent:
            raise ValueError(f"num_frames must be {per_latent}n+1 (e.g. 77, 81), got {num_frames}")
        for name, size in (("height", height), ("width", width)):
            if size < per_pixel or size % per_pixel:
                raise ValueError(f"{name} must be a positive multiple of {per_pixel}, got {size}")
        frames = (num_frames - 1) // per_latent + 1
        return self.z_dim, frames, height // per_pixel, width // per_pixel


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Dimensions of the UMT5 encoder."""

    vocab_size: int
    dim: int
    head_dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size dim head_dim num_heads ffn_dim num_layers num_buckets")


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Dimensions of CLIP's visual tower, its last block included."""

    image_size: int
    patch_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive(self, "image_size patch_size dim ffn_dim num_heads num_layers")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not fill {self.image_size} pixels")

    @property
    def num_tokens(self) -> int:
        """One for the whole image, one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


WAN_T2V_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_T2V_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_I2V_14B = TransformerConfig(
    dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, image_dim=WAN_IMAGE_DIM
)
WAN_VAE = VAEConfig()
UMT5_XXL = TextEncoderConfig(
    vocab_size=256384, dim=4096, head_dim=64, num_heads=64, ffn_dim=10240, num_layers=24
)
CLIP_VIT_H_14 = ImageEncoderConfig(
    image_size=224, patch_size=14, dim=WAN_IMAGE_DIM, ffn_dim=5120, num_heads=16, num_layers=32
)

TINY = TransformerConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=512)
TINY_VAE = VAEConfig(base_dim=8, num_res_blocks=1)
TINY_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=264, dim=32, head_dim=16, num_heads=2, ffn_dim=64, num_layers=2
)
TINY_I2V = dataclasses.replace(TINY, in_dim=36, image_dim=48)
TINY_IMAGE_ENCODER = ImageEncoderConfig(
    image_size=56, patch_size=14, dim=48, ffn_dim=96, num_heads=2, num_layers=3
)
