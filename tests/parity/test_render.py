"""The whole way from noise to frames, against diffusers' networks and arithmetic written here."""

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from benchmarks import paired, scales
from benchmarks import reference as benchmark_reference
from models import config, sampling
from worker import device

# shift * s / (1 + (shift - 1) * s) of s = 1, 3/4, 1/2, 1/4 at shift 5
SIGMAS = [1.0, 15 / 16, 5 / 6, 5 / 8]


def reference_latents(reference, context, noise, step_rule, fresh_noise):
    """Four steps on diffusers' transformer; euler in its other form, x - (sigma - sigma') v."""
    x = noise.clone()
    for step, sigma in enumerate(SIGMAS):
        timestep = torch.tensor([1000 * sigma], dtype=torch.float64)
        v = reference(x, timestep, context).sample
        if step == 3 or step_rule == "euler":
            following = 0.0 if step == 3 else SIGMAS[step + 1]
            x = x - (sigma - following) * v
        else:
            x0 = x - sigma * v
            following = SIGMAS[step + 1]
            x = (1 - following) * x0 + following * fresh_noise[step]
    return x


def reference_frames(reference, latents):
    mean = torch.tensor(reference.config.latents_mean, dtype=latents.dtype).view(1, 16, 1, 1, 1)
    inverse_std = 1 / torch.tensor(reference.config.latents_std, dtype=latents.dtype)
    return reference.decode(latents / inverse_std.view(1, 16, 1, 1, 1) + mean).sample


@pytest.mark.parametrize("step_rule", ["euler", "renoise"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_four_steps_and_decode(
    dtype,
    tolerance,
    step_rule,
    transformer_pair,
    vae_pair,
    draw,
    relative_error,
    exact_levels,
    request,
):
    if dtype == torch.float64:
        request.getfixturevalue("in_fp64")
    their_transformer, our_transformer = transformer_pair(dtype)
    their_vae, our_vae = vae_pair(dtype)
    sizes = our_transformer.config
    context = draw(1, sizes.text_len, sizes.text_dim, dtype=dtype)
    shape = our_vae.config.latent_shape(num_frames=9, height=32, width=48)
    assert shape == (16, 3, 4, 6)

    levels = exact_levels if dtype == torch.float64 else table_levels()
    noise, generator = sampling.initial_noise(11, shape, "cpu")
    latents = sampling.denoise(
        lambda x, t: our_transformer(x, t, context),
        noise.to(dtype),
        levels,
        step_rule=step_rule,
        generator=generator,
    )
    again = torch.Generator().manual_seed(11)
    draws = [torch.randn((1, *shape), generator=again).to(dtype) for _ in range(4)]
    expected = reference_latents(their_transformer, context, draws[0], step_rule, draws[1:])
    assert latents.dtype == dtype
    assert relative_error(latents, expected) < tolerance

    frames = torch.cat(list(our_vae.decode_chunks(latents)), dim=2)
    assert frames.shape == (1, 3, 9, 32, 48)
    assert relative_error(frames, reference_frames(their_vae, expected)) < tolerance


@pytest.fixture
def both(tmp_path):
    """The benchmark of pairs, at a tiny size."""
    cpu = device.Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="CPU")
    scale = scales.Scale(
        sizes=scales.Sizes(
            transformer=config.TINY,
            vae=config.TINY_VAE,
            text_encoder=config.TINY_TEXT_ENCODER,
        ),
        width=32,
        height=16,
        num_frames=5,
        latents=(16, 2, 2, 4),
        image=(16, 32),
    )
    benchmark_reference.write(
        tmp_path / scales.MODEL, scale.sizes, dtype=cpu.dtype, device=cpu.torch_device
    )
    return paired.Both(tmp_path, scale, cpu, 1)


def test_a_benchmarked_pair_renders_the_same_frames(both, monkeypatch):
    """Prompt to 8 bits; neither side's frames go through numpy."""
    monkeypatch.setattr(VaeImageProcessor, "pt_to_numpy", None)
    ours, theirs = both._rendered_by_us(), both._rendered_by_them(both.theirs)
    assert ours.dtype == theirs.dtype == torch.uint8
    assert ours.shape == theirs.shape == (5, 16, 32, 3)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert ours.float().std() > 1


def test_an_encoded_image_is_that_of_all_its_frames(both):
    assert both.image()["relative_difference"] < 1e-5


def test_a_compiled_pair_is_one_of_compiled_blocks(both):
    assert all(block._compiled_call_impl for block in both.theirs_compiled.transformer.blocks)
    assert not any(block._compiled_call_impl for block in both.theirs.transformer.blocks)


def table_levels():
    return sampling.noise_levels([1000, 750, 500, 250], 5.0)
