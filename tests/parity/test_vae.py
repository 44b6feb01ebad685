"""The autoencoder computes what diffusers' AutoencoderKLWan computes, chunk by chunk."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from models import config, vae, weight_names

SMALL = config.VAEConfig(base_dim=8, num_res_blocks=1)
TWO_BLOCKS = config.VAEConfig(base_dim=4, num_res_blocks=2)


def statistics(reference, dtype):
    """diffusers leaves normalisation to its pipelines: latents = (mu - mean) / std."""
    mean = torch.tensor(reference.config.latents_mean, dtype=dtype)[None, :, None, None, None]
    std = torch.tensor(reference.config.latents_std, dtype=dtype)[None, :, None, None, None]
    return mean, std


def reference_encode(reference, frames):
    mean, std = statistics(reference, frames.dtype)
    return (reference.encode(frames).latent_dist.mode() - mean) / std


def reference_decode(reference, latents):
    mean, std = statistics(reference, latents.dtype)
    return reference.decode(latents * std + mean).sample


def decode(ours, latents):
    return torch.cat(list(ours.decode_chunks(latents)), dim=2)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
@pytest.mark.parametrize("sizes", [SMALL, TWO_BLOCKS], ids=["one-block", "two-blocks"])
def test_encode_agrees_in_fp64(num_frames, sizes, vae_pair, in_fp64, draw, relative_error):
    reference, ours = vae_pair(torch.float64, sizes=sizes)
    frames = draw(1, 3, num_frames, 24, 40).tanh()
    error = relative_error(ours.encode(frames), reference_encode(reference, frames))
    assert error < 1e-10


@pytest.mark.parametrize("num_latents", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [SMALL, TWO_BLOCKS], ids=["one-block", "two-blocks"])
def test_decode_agrees_in_fp64(num_latents, sizes, vae_pair, in_fp64, draw, relative_error):
    reference, ours = vae_pair(torch.float64, sizes=sizes)
    latents = draw(2, 16, num_latents, 3, 5)
    frames = decode(ours, latents)
    assert frames.shape == (2, 3, 4 * num_latents - 3, 24, 40)
    assert frames.abs().max() <= 1
    assert (frames.abs() == 1).double().mean() < 0.5, "too much is clamped to compare"
    expected = reference_decode(reference, latents)
    assert (frames - expected).abs().max() < 1e-10
    assert relative_error(frames, expected) < 1e-10


def test_channels_last_weights_change_nothing_but_rounding(vae_pair, in_fp64, draw, relative_error):
    reference, ours = vae_pair(torch.float64)
    vae.to_channels_last(ours)
    frames, latents = draw(1, 3, 9, 24, 40).tanh(), draw(1, 16, 3, 3, 5)
    assert relative_error(ours.encode(frames), reference_encode(reference, frames)) < 1e-10
    assert relative_error(decode(ours, latents), reference_decode(reference, latents)) < 1e-10


def test_both_ways_agree_in_fp32(vae_pair, draw, relative_error):
    reference, ours = vae_pair(torch.float32)
    frames = draw(1, 3, 9, 24, 40, dtype=torch.float32).tanh()
    assert relative_error(ours.encode(frames), reference_encode(reference, frames)) < 1e-5
    latents = draw(1, 16, 3, 3, 5, dtype=torch.float32)
    assert relative_error(decode(ours, latents), reference_decode(reference, latents)) < 1e-5


def test_bf16_decode_is_as_close_to_fp64_as_the_reference(
    vae_pair, in_fp64, draw, relative_error, monkeypatch
):
    exact, _ = vae_pair(torch.bfloat16)
    latents = draw(1, 16, 3, 4, 6)
    truth = reference_decode(torch.nn.Module.to(exact, torch.float64), latents)
    monkeypatch.undo()

    reference, ours = vae_pair(torch.bfloat16)
    mean, std = statistics(reference, torch.float64)
    raw = (latents * std + mean).to(torch.bfloat16)
    theirs = relative_error(reference.decode(raw).sample, truth)
    own = relative_error(decode(ours, latents), truth)
    assert own <= 1.1 * theirs, f"ours {own:.2e}, diffusers {theirs:.2e}"


def test_names_and_shapes_at_full_size():
    with torch.device("meta"):
        ours = vae.WanVAE(config.WAN_VAE).state_dict()
        theirs = AutoencoderKLWan().state_dict()
    names = weight_names.vae_from_diffusers(ours, num_res_blocks=2)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert {names[name]: tensor.shape for name, tensor in theirs.items()} == shapes
    assert sum(tensor.numel() for tensor in ours.values()) == 126_892_531


def test_native_names_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape) for name, t in vae.WanVAE(config.WAN_VAE).state_dict().items()
        }
    anchors = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.6.weight": (96, 96, 3, 3, 3),
        "decoder.head.0.gamma": (96, 1, 1, 1),
    }
    assert {name: shapes[name] for name in anchors} == anchors


def test_default_statistics_are_those_of_diffusers():
    found = AutoencoderKLWan.from_config(AutoencoderKLWan(base_dim=4).config).config
    assert config.WAN_VAE.latent_mean == tuple(found.latents_mean)
    assert config.WAN_VAE.latent_std == tuple(found.latents_std)
