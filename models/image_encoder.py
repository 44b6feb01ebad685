"""Image to tokens: the visual tower of Wan2.1's CLIP, with its preparation of the image.

Parameters are named as in `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`. Wan takes the
tokens that go into the last block; that block is loaded, so that a file of another depth is
noticed, and never run.
"""

# B batch, C RGB, H W rows columns, I image tokens (one for the whole, then the patches row by row),
# D width, N heads, K head dim

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import attention, config, transformer

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class LayerNorm(transformer.LayerNorm):
    """Computed at least in fp32, returned in the dtype it came in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, sizes: config.ImageEncoderConfig) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.to_qkv = nn.Linear(sizes.dim, 3 * sizes.dim)
        self.proj = nn.Linear(sizes.dim, sizes.dim)

    def forward(self, x_BID: Tensor) -> Tensor:
        qkv_BI3NK = self.to_qkv(x_BID).unflatten(-1, (3, self.num_heads, -1))
        attended_BINK = attention.attend(*qkv_BI3NK.unbind(2))
        projected: Tensor = self.proj(attended_BINK.flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, sizes: config.ImageEncoderConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(sizes.dim, eps=sizes.eps)
        self.attn = SelfAttention(sizes)
        self.norm2 = LayerNorm(sizes.dim, eps=sizes.eps)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn_dim), nn.GELU(), nn.Linear(sizes.ffn_dim, sizes.dim)
        )

    def forward(self, x_BID: Tensor) -> Tensor:
        x_BID = x_BID + self.attn(self.norm1(x_BID))
        out: Tensor = x_BID + self.mlp(self.norm2(x_BID))
        return out


class VisualTower(nn.Module):
    """A vision transformer up to what goes into its last block; without norm or projection."""

    def __init__(self, sizes: config.ImageEncoderConfig) -> None:
        super().__init__()
        patch, dim = sizes.patch_size, sizes.dim
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch, stride=patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, sizes.num_tokens, dim) / dim**0.5)
        self.pre_norm = LayerNorm(dim, eps=sizes.eps)
        self.transformer = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        patches_BID = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        whole_B1D = self.cls_embedding.expand(patches_BID.shape[0], -1, -1)
        x_BID: Tensor = torch.cat([whole_B1D, patches_BID], dim=1) + self.pos_embedding
        x_BID = self.pre_norm(x_BID)
        for block in self.transformer[:-1]:
            x_BID = block(x_BID)
        return x_BID


class ImageEncoder(nn.Module):
    """Turns an image of any size into the tokens that the transformer attends to."""

    def __init__(self, sizes: config.ImageEncoderConfig) -> None:
        super().__init__()
        self.config = sizes
        self.visual = VisualTower(sizes)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Image in [-1, 1] to tokens [B, 257, 1280], in the dtype of the weights."""
        weight = self.visual.patch_embedding.weight
        pixels_BCHW = prepare(image_BCHW, self.config.image_size)
        tokens_BID: Tensor = self.visual(pixels_BCHW.to(weight))
        return tokens_BID


def prepare(image_BCHW: Tensor, image_size: int) -> Tensor:
    """An image in [-1, 1] as the tower saw images in Wan's training.

    The whole image is stretched to a square by bicubic interpolation without antialiasing.
    transformers' CLIPImageProcessor, which diffusers' pipeline uses, keeps the aspect, crops the
    middle and antialiases, so its tokens are others, and blind to what lies at the sides.
    """
    side = (image_size, image_size)
    square_BCHW = functional.interpolate(image_BCHW, size=side, mode="bicubic", align_corners=False)
    mean, std = (image_BCHW.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (square_BCHW * 0.5 + 0.5 - mean) / std
