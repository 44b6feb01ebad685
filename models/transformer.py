"""The diffusion transformer of Wan2.1; parameters are named as in the official checkpoints.

What is computed in which dtype, for weights in bf16 (fp32 and fp64 weights compute in their own):
fp32 are the time embedding, the modulation and everything it touches (layer norms, gates), the
rotation of q and k, the sums inside every norm, and the head; bf16 are the projections, the
attention and the stream of tokens between blocks, which is rounded once per residual.
"""

# B batch, C latent channels, T H W latent frames rows columns, L tokens, S text tokens,
# I image tokens, D width, F width inside the feed-forward net, N heads, K head dim, G text or
# image width before its embedding
# 6: shift, scale, gate of self-attention, then of the feed-forward net; 2: shift, scale of the head

from typing import TypeGuard

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import attention, config, fp8, fusion, norms, rope, sequence_parallel

# Small parameters that a bf16 network keeps in fp32, as official Wan does.
FP32_PARAMETERS = ("time_embedding.", "time_projection.", "modulation", "norm3.", "head.")


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter is kept when the network computes in `dtype`."""
    return widened(dtype) if any(part in name for part in FP32_PARAMETERS) else dtype


def widened(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: bf16 -> fp32, fp32 and fp64 unchanged."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    return x.to(widened(x.dtype))


class WideLinear(nn.Linear):
    """A Linear that computes in fp32 even where its weights were cast to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else widen(self.bias)
        return functional.linear(widen(x), widen(self.weight), bias)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm over D whose result is at least fp32; the caller casts it after modulation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else widen(self.weight)
        bias = None if self.bias is None else widen(self.bias)
        return functional.layer_norm(widen(x), self.normalized_shape, weight, bias, self.eps)


def _modulated(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    normed_BLD = functional.layer_norm(widen(x_BLD), x_BLD.shape[-1:], eps=eps)
    return torch.addcmul(shift_B1D, normed_BLD, 1 + scale_B1D).to(x_BLD.dtype)


@fusion.chain
def modulated(
    x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float, form: fp8.Form
) -> fp8.Tokens:
    """LayerNorm, scaled and shifted by the time; in the dtype of `x`."""
    return fp8.in_form(_modulated(x_BLD, scale_B1D, shift_B1D, eps), form)


@fusion.chain
def added_then_modulated(
    x_BLD: Tensor,
    y_BLD: Tensor,
    scale_B1D: Tensor,
    shift_B1D: Tensor,
    eps: float,
    form: fp8.Form,
) -> tuple[Tensor, fp8.Tokens]:
    """x + y, and that modulated."""
    x_BLD = x_BLD + y_BLD
    return x_BLD, fp8.in_form(_modulated(x_BLD, scale_B1D, shift_B1D, eps), form)


@fusion.chain
def modulated_widely(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    """LayerNorm, scaled and shifted by the time; at least fp32."""
    normed_BLD = functional.layer_norm(widen(x_BLD), x_BLD.shape[-1:], eps=eps)
    return normed_BLD * (1 + scale_B1D) + shift_B1D


@fusion.chain
def gated(x_BLD: Tensor, y_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
    """x + y * gate, rounded once."""
    return torch.addcmul(x_BLD, y_BLD, gate_B1D).to(x_BLD.dtype)


@fusion.chain
def gated_then_normed(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_B1D: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    form: fp8.Form,
) -> tuple[Tensor, fp8.Tokens]:
    """x + y * gate, and its LayerNorm."""
    x_BLD = torch.addcmul(x_BLD, y_BLD, gate_B1D).to(x_BLD.dtype)
    normed_BLD = functional.layer_norm(
        widen(x_BLD), x_BLD.shape[-1:], widen(weight_D), widen(bias_D), eps
    )
    return x_BLD, fp8.in_form(normed_BLD.to(x_BLD.dtype), form)


def has_gelu_in_product(layer: nn.Module, x_BLD: Tensor) -> TypeGuard[nn.Linear]:
    """Whether cuBLAS can apply GELU to what it writes; torch has no gradient of that."""
    return (
        type(layer) is nn.Linear  # what a subclass does beside its product would be left out
        and x_BLD.is_cuda
        and x_BLD.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
    )


def product_then_gelu(layer: nn.Linear, x_BLD: Tensor) -> Tensor:
    """GELU, tanh's approximation, of the layer: rounded once, and no pass over the widest tokens.

    The operation is torch's for its compiler, and takes the approximation on CUDA only.
    """
    y_MF = torch._addmm_activation(
        layer.bias, x_BLD.flatten(0, -2), layer.weight.t(), use_gelu=True
    )
    return y_MF.view(*x_BLD.shape[:-1], -1)


@fusion.chain
def normed_heads_rotated(
    x_BLD: Tensor, weight_D: Tensor, cos_LK: Tensor, sin_LK: Tensor, eps: float
) -> Tensor:
    """RMSNorm over the full width, then heads [B, L, N, K], each turned by its token's angles.

    The weight is rounded to the dtype of `x`: a training keeps it in fp32.
    """
    normed_BLD = norms.rms_norm(x_BLD, weight_D.to(x_BLD.dtype), eps)
    heads_BLNK = normed_BLD.view(*normed_BLD.shape[:-1], -1, cos_LK.shape[-1])
    return rope.rotate(heads_BLNK, (cos_LK, sin_LK))


class Attention(nn.Module):
    """Parts of both attentions; q and k are RMS-normalised over the full width, before heads."""

    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.q = nn.Linear(sizes.dim, sizes.dim)
        self.k = nn.Linear(sizes.dim, sizes.dim)
        self.v = nn.Linear(sizes.dim, sizes.dim)
        self.o = nn.Linear(sizes.dim, sizes.dim)
        self.norm_q = norms.RMSNorm(sizes.dim, eps=sizes.eps)
        self.norm_k = norms.RMSNorm(sizes.dim, eps=sizes.eps)

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.view(*x_BLD.shape[:-1], self.num_heads, -1)


class SelfAttention(Attention):
    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__(sizes)
        self.tokens: sequence_parallel.Tokens = sequence_parallel.AllTokens()

    def form(self, like_BLD: Tensor) -> fp8.Form:
        """In which `forward` wants its tokens."""
        return fp8.wanted(like_BLD, self.q, self.k, self.v)

    def forward(self, x_BLD: fp8.Tokens, rotation: rope.Rotation) -> Tensor:
        q_BLNK = self._turned(self.q(x_BLD), self.norm_q, rotation)
        k_BLNK = self._turned(self.k(x_BLD), self.norm_k, rotation)
        out_BLNK = self.tokens.attend(q_BLNK, k_BLNK, self.heads(self.v(x_BLD)))
        projected: Tensor = self.o(out_BLNK.flatten(2))
        return projected

    def _turned(self, x_BLD: Tensor, norm: nn.RMSNorm, rotation: rope.Rotation) -> Tensor:
        assert norm.eps is not None
        return normed_heads_rotated(x_BLD, norm.weight, *rotation, norm.eps)


class CrossAttention(Attention):
    """Attends to every text row, padding included: the network was trained without a mask."""

    def form(self, like_BLD: Tensor) -> fp8.Form:
        """In which `forward` wants its tokens."""
        return fp8.wanted(like_BLD, self.q)

    def forward(self, x_BLD: fp8.Tokens, text_BSD: Tensor, _image_BID: Tensor | None) -> Tensor:
        projected: Tensor = self.o(self.attend_to_text(self.query(x_BLD), text_BSD).flatten(2))
        return projected

    def query(self, x_BLD: fp8.Tokens) -> Tensor:
        return self.heads(self.norm_q(self.q(x_BLD)))

    def attend_to_text(self, q_BLNK: Tensor, text_BSD: Tensor) -> Tensor:
        k_BSNK = self.heads(self.norm_k(self.k(text_BSD)))
        return attention.attend(q_BLNK, k_BSNK, self.heads(self.v(text_BSD)))


class ImageCrossAttention(CrossAttention):
    """Of image-to-video: text and image are attended to apart with one query, and summed."""

    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__(sizes)
        self.k_img = nn.Linear(sizes.dim, sizes.dim)
        self.v_img = nn.Linear(sizes.dim, sizes.dim)
        self.norm_k_img = norms.RMSNorm(sizes.dim, eps=sizes.eps)

    def forward(self, x_BLD: fp8.Tokens, text_BSD: Tensor, image_BID: Tensor | None) -> Tensor:
        assert image_BID is not None
        q_BLNK = self.query(x_BLD)
        k_BINK = self.heads(self.norm_k_img(self.k_img(image_BID)))
        image_BLNK = attention.attend(q_BLNK, k_BINK, self.heads(self.v_img(image_BID)))
        both_BLNK = self.attend_to_text(q_BLNK, text_BSD) + image_BLNK
        projected: Tensor = self.o(both_BLNK.flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__()
        cross_attention = ImageCrossAttention if sizes.image_dim else CrossAttention
        self.eps = sizes.eps
        self.self_attn = SelfAttention(sizes)
        self.norm3 = LayerNorm(sizes.dim, eps=sizes.eps)
        self.cross_attn = cross_attention(sizes)
        self.ffn = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.ffn_dim, sizes.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, sizes.dim) / sizes.dim**0.5)

    def forward(
        self,
        x_BLD: Tensor,
        time_B6D: Tensor,
        text_BSD: Tensor,
        image_BID: Tensor | None,
        rotation: rope.Rotation,
    ) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            widen(self.modulation) + time_B6D
        ).chunk(6, dim=1)
        norm, attends, reads = self.norm3, self.self_attn, self.cross_attn
        # One name for what goes from layer to layer: what has been used is not kept.
        y = modulated(x_BLD, scale, shift, self.eps, attends.form(x_BLD))
        y = attends(y, rotation)
        x_BLD, y = gated_then_normed(
            x_BLD, y, gate, norm.weight, norm.bias, norm.eps, reads.form(x_BLD)
        )
        y = reads(y, text_BSD, image_BID)
        form = fp8.wanted(x_BLD, self.ffn[0])
        x_BLD, y = added_then_modulated(x_BLD, y, ffn_scale, ffn_shift, self.eps, form)
        return gated(x_BLD, self._feed_forward(y), ffn_gate)

    def _feed_forward(self, y: fp8.Tokens) -> Tensor:
        widening, gelu, narrowing = self.ffn
        if isinstance(y, Tensor) and has_gelu_in_product(widening, y):
            y = product_then_gelu(widening, y)
        else:
            y = _activated(widening(y), gelu, narrowing)
        narrowed_BLD: Tensor = narrowing(y)
        return narrowed_BLD


def _activated(hidden_BLF: Tensor, gelu: nn.Module, narrowing: nn.Module) -> fp8.Tokens:
    """In the form that the layer after it wants."""
    form = fp8.wanted(hidden_BLF, narrowing)
    if form is not fp8.Form.WHOLE:
        return fp8.gelu_coded(hidden_BLF, form)
    activated: Tensor = gelu(hidden_BLF)
    return activated


class Head(nn.Module):
    """Tokens to patches; modulated by the time embedding itself, not by its projection."""

    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__()
        frames, rows, columns = sizes.patch_size
        self.norm = LayerNorm(sizes.dim, eps=sizes.eps, elementwise_affine=False)
        self.head = WideLinear(sizes.dim, frames * rows * columns * sizes.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, sizes.dim) / sizes.dim**0.5)

    def forward(self, x_BLD: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (widen(self.modulation) + time_BD.unsqueeze(1)).chunk(2, dim=1)
        patches: Tensor = self.head(modulated_widely(x_BLD, scale, shift, self.norm.eps))
        return patches


class ImageEmbedding(nn.Module):
    """CLIP's image tokens to the transformer's width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim),
            WideLinear(image_dim, image_dim),
            nn.GELU(),
            WideLinear(image_dim, dim),
            LayerNorm(dim),
        )

    def forward(self, image_BIG: Tensor) -> Tensor:
        embedded: Tensor = self.proj(image_BIG)
        return embedded


class WanTransformer(nn.Module):
    """Predicts the velocity of noisy latents under a text, and for image-to-video an image."""

    def __init__(self, sizes: config.TransformerConfig) -> None:
        super().__init__()
        self.config = sizes
        dim = sizes.dim
        self.patch_embedding = nn.Conv3d(
            sizes.in_dim, dim, kernel_size=sizes.patch_size, stride=sizes.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            WideLinear(sizes.freq_dim, dim), nn.SiLU(), WideLinear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), WideLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.head = Head(sizes)
        if sizes.image_dim:
            self.img_emb = ImageEmbedding(sizes.image_dim, dim)
        self.tokens: sequence_parallel.Tokens = sequence_parallel.AllTokens()

    def share(self, tokens: sequence_parallel.Tokens) -> None:
        """Compute each forward together with other processes from now on.

        Raises ValueError where the heads cannot be shared by so many.
        """
        tokens.check(self.config.num_heads)
        self.tokens = tokens
        for part in self.modules():
            if isinstance(part, SelfAttention):
                part.tokens = tokens

    @property
    def dtype(self) -> torch.dtype:
        """What the projections compute in."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents_BCTHW: Tensor,
        timestep_B: Tensor,
        context_BSG: Tensor,
        image_BIG: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the latents, [B, out_dim, T, H, W], in fp32 (fp64 weights: fp64).

        `timestep_B` is 1000 * sigma, not rounded. `context_BSG` holds all `text_len` rows, those
        after the prompt zeroed. Image-to-video takes latents with mask and condition in the
        channels after the noise, and CLIP's tokens. Raises ValueError for other shapes.
        """
        self._check(latents_BCTHW, context_BSG, image_BIG)
        x_BLD, grid = self._patchify(latents_BCTHW.to(self.dtype))
        time_BD, time_B6D = self._embed_time(timestep_B)
        text_BSD = self.text_embedding(context_BSG.to(self.dtype))
        image_BID = None if image_BIG is None else self.img_emb(image_BIG).to(self.dtype)
        rotation = rope.table(grid, self.config.head_dim, x_BLD.device, widened(self.dtype))
        x_BLD, rotation = self.tokens.split(x_BLD, rotation)
        for block in self.blocks:
            x_BLD = block(x_BLD, time_B6D, text_BSD, image_BID, rotation)
        patches_BLD = self.tokens.join(self.head(x_BLD, time_BD))
        return unpatchify(patches_BLD, grid, self.config)

    def _patchify(self, latents_BCTHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """A token per patch, and how many there are along each axis."""
        x_BDTHW = self.patch_embedding(latents_BCTHW)
        frames, rows, columns = x_BDTHW.shape[2:]
        return x_BDTHW.flatten(2).transpose(1, 2).contiguous(), (frames, rows, columns)

    def _embed_time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        waves = sinusoid(timestep_B, self.config.freq_dim)
        time_BD = self.time_embedding(waves.to(widened(self.dtype)))
        return time_BD, self.time_projection(time_BD).unflatten(1, (6, -1))

    def _check(self, latents: Tensor, context: Tensor, image: Tensor | None) -> None:
        sizes, patch = self.config, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != sizes.in_dim:
            raise ValueError(f"latents must be [B, {sizes.in_dim}, T, H, W], got {_shape(latents)}")
        if any(size % step for size, step in zip(latents.shape[2:], patch, strict=True)):
            raise ValueError(f"T, H, W must be multiples of {patch}, got {_shape(latents)}")
        if context.shape[1:] != (sizes.text_len, sizes.text_dim):
            wanted = f"[B, {sizes.text_len}, {sizes.text_dim}]"
            raise ValueError(f"context must be {wanted}, got {_shape(context)}")
        if (image is None) != (sizes.image_dim is None):
            raise ValueError("image tokens go with an image-to-video network, and only with it")


def sinusoid(timestep_B: Tensor, freq_dim: int) -> Tensor:
    """[cos | sin] of t * 10000^(-i / half) for i < half = freq_dim / 2, in fp64."""
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep_B.device) / half
    angles = torch.outer(timestep_B.to(torch.float64), 10000.0**-exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def unpatchify(
    patches_BLD: Tensor, grid: tuple[int, int, int], sizes: config.TransformerConfig
) -> Tensor:
    """Tokens of patches, channels last inside a patch, to [B, C, T, H, W]."""
    return einops.rearrange(
        patches_BLD,
        "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
        **dict(zip(("f", "h", "w"), grid, strict=True)),
        **dict(zip(("pf", "ph", "pw"), sizes.patch_size, strict=True)),
    )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
