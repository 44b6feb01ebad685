"""diffusers' and transformers' networks, at any size: what ours are compared with."""

# T frames, C channels, H height, W width

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from benchmarks import scales
from models import config, text_encoder
from models.tiny import make


class FourSteps(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler at the levels of the distilled models: (1, .75, .5, .25) shifted by 5."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        assert num_inference_steps == 4
        super().set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device=device)


def transformer(sizes: config.TransformerConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.in_dim,
        out_channels=sizes.out_dim,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        image_dim=sizes.image_dim,
        added_kv_proj_dim=sizes.dim if sizes.image_dim else None,
    )


def autoencoder(sizes: config.VAEConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=sizes.base_dim,
        z_dim=sizes.z_dim,
        dim_mult=list(sizes.dim_mult),
        num_res_blocks=sizes.num_res_blocks,
        temperal_downsample=list(sizes.temporal_downsample),
    )


def clip_config(sizes: config.ImageEncoderConfig, **more: Any) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="gelu",
        layer_norm_eps=sizes.eps,
        **more,
    )


def write(folder: Path, sizes: scales.Sizes, *, dtype: torch.dtype, device: torch.device) -> Path:
    """A model folder in diffusers' layout, with random weights: both sides load it."""
    torch.manual_seed(0)
    with device:
        networks = {
            "transformer": transformer(sizes.transformer),
            "vae": autoencoder(sizes.vae),
            "text_encoder": text_encoder.build_network(sizes.text_encoder),
        }
    for name, network in networks.items():
        torch.nn.Module.to(network, dtype).save_pretrained(folder / name)
    make.write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return folder


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> WanPipeline:
    """diffusers' pipeline of a folder, with the four steps of the distilled models."""
    parts = {
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
    }
    loaded = {
        name: kind.from_pretrained(folder / name, dtype=dtype)
        if name == "text_encoder"
        else kind.from_pretrained(folder / name, torch_dtype=dtype)
        for name, kind in parts.items()
    }
    pipeline = WanPipeline(
        tokenizer=text_encoder.load_tokenizer(folder / "tokenizer"),
        scheduler=FourSteps(shift=5.0),
        **loaded,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def to_uint8(frames_TCHW: torch.Tensor) -> torch.Tensor:
    """[0, 1], as the pipeline gives with `output_type="pt"`, to frames_THWC on the host.

    Rounded where they are and sent in 8 bits, as ours are: the pipeline would send fp32 to numpy.
    """
    scaled = frames_TCHW.float().mul_(255).round_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
