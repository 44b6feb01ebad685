"""Image-to-video against diffusers' WanImageToVideoPipeline: its condition, its loop, its frames.

Its parts are the reference; where its preparation of an image is another one than Wan's, the test
says so and hands both the same pixels.
"""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import BatchFeature, CLIPVisionModel

from benchmarks import reference as transformers
from models import checkpoint, conditioning, config, image_encoder, sampling, weight_names
from models.conditioning import Condition, Target

# diffusers' image-to-video attention takes the last 512 rows for text, whatever the config says.
DIT = config.TransformerConfig(
    dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_dim=36, text_dim=40, image_dim=32
)
CLIP = config.ImageEncoderConfig(
    image_size=28, patch_size=14, dim=32, ffn_dim=64, num_heads=2, num_layers=3
)
TARGET = Target(width=48, height=32, num_frames=9)


class Stretching:
    """Stands for CLIPImageProcessor, and prepares the image as official Wan does instead."""

    def __call__(self, images, return_tensors):  # noqa: ARG002  # the processor's signature
        levels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float() / 255
        side = (CLIP.image_size, CLIP.image_size)
        square = torch.nn.functional.interpolate(levels, side, mode="bicubic")
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        return BatchFeature({"pixel_values": (square - mean) / std})


@pytest.fixture
def clip_pair():
    def build(dtype):
        torch.manual_seed(5)
        reference = CLIPVisionModel(transformers.clip_config(CLIP, initializer_factor=5.0))
        reference = reference.to(dtype).eval().requires_grad_(False)
        ours = image_encoder.ImageEncoder(CLIP).to(dtype)
        names = weight_names.image_encoder_from_transformers(ours.state_dict())
        theirs = {names[k]: t for k, t in reference.state_dict().items() if k in names}
        ours.load_state_dict(checkpoint.joined_qkv(theirs, ours.state_dict().keys()))
        return reference, ours.eval().requires_grad_(False)

    return build


@pytest.fixture
def worlds(transformer_pair, vae_pair, clip_pair, four_steps):
    """The pipeline of the reference networks, and ours with equal weights."""

    def build(dtype):
        their_dit, dit = transformer_pair(dtype, sizes=DIT)
        their_vae, vae = vae_pair(dtype)
        their_clip, clip = clip_pair(dtype)
        pipeline = WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=their_vae,
            scheduler=four_steps(),
            image_encoder=their_clip,
            image_processor=None,
            transformer=their_dit,
        )
        pipeline.image_processor = Stretching()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, checkpoint.ImageToVideoNetworks(
            text_encoder=None, transformer=dit, vae=vae, image_encoder=clip
        )

    return build


def picture(width, height):
    """Smooth, so that filters of different widths still show nearly the same."""
    rows, columns = np.mgrid[0:height, 0:width] / (height, width)[0]
    waves = [np.sin(3 * rows + 2 * columns + phase) for phase in (0, 1, 2)]
    return Image.fromarray((127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


def levels(image):
    return torch.from_numpy(np.array(image))


def signed(image):
    return conditioning.to_signed(levels(image))


def encode(networks, image, target=TARGET):
    return conditioning.encode(
        levels(image), target, clip=networks.image_encoder, autoencoder=networks.vae
    )


def their_condition(pipeline, frame_BCHW, dtype, target=TARGET):
    latents = torch.zeros(1, 16, (target.num_frames - 1) // 4 + 1, 4, 6, dtype=dtype)
    _, condition = pipeline.prepare_latents(
        frame_BCHW,
        1,
        16,
        target.height,
        target.width,
        target.num_frames,
        dtype,
        torch.device("cpu"),
        latents=latents,
    )
    return condition


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_the_condition_agrees_in_fp64(num_frames, worlds, in_fp64, in_default_fp64, relative_error):
    """Given the same first frame, the pipeline's `prepare_latents` gives mask and latents."""
    pipeline, networks = worlds(torch.float64)
    target = dataclasses.replace(TARGET, num_frames=num_frames)
    image = picture(101, 70)
    frame = conditioning.first_frame(signed(image), target)
    ours = encode(networks, image, target).y_BCTHW
    theirs = their_condition(pipeline, frame, torch.float64, target)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert relative_error(ours[:, 4:], theirs[:, 4:]) < 1e-9


def test_the_condition_of_an_image_of_the_videos_size_agrees_from_its_file_on(
    worlds, relative_error
):
    """Nothing is resized then, and the pipeline's own preparation of the frame is used, in fp32."""
    pipeline, networks = worlds(torch.float32)
    image = picture(TARGET.width, TARGET.height)
    frame = pipeline.video_processor.preprocess(image, TARGET.height, TARGET.width)
    theirs = their_condition(pipeline, frame, torch.float32)
    assert relative_error(encode(networks, image).y_BCTHW[:, 4:], theirs[:, 4:]) < 1e-5


def test_diffusers_resizes_with_another_filter(worlds):
    """Pillow's Lanczos, antialiased and rounded to 8 bits; Wan's is torch's plain bicubic."""
    pipeline, _ = worlds(torch.float32)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    theirs = pipeline.video_processor.preprocess(image, TARGET.height, TARGET.width)
    ours = conditioning.first_frame(signed(image), TARGET)
    assert (ours - theirs).abs().mean() > 0.1
    assert theirs.std() < 0.5 * ours.std(), "antialiasing flattens noise"


def test_tokens_agree_in_fp64(worlds, relative_error):
    """The pipeline's `encode_image`: hidden_states[-2] of what its processor hands over."""
    pipeline, networks = worlds(torch.float64)
    image = picture(101, 70)
    pixels = image_encoder.prepare(signed(image), CLIP.image_size)
    pipeline.image_processor = lambda images, return_tensors: BatchFeature(
        {"pixel_values": pixels.double()}
    )
    theirs = pipeline.encode_image(image)
    assert theirs.shape == (1, 5, 32)
    assert relative_error(encode(networks, image).image_tokens_BIG, theirs) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_the_whole_pipeline_agrees(
    dtype, tolerance, worlds, draw, relative_error, rendered_by, exact_levels, request
):
    """For fp64 what diffusers hard-codes as fp32 is widened (see conftest), for fp32 nothing is."""
    if dtype == torch.float64:
        request.getfixturevalue("pipelines_in_fp64")
    pipeline, networks = worlds(dtype)
    image = picture(TARGET.width, TARGET.height)
    context = draw(1, 512, DIT.text_dim, dtype=dtype)
    shape = networks.vae.config.latent_shape(num_frames=9, height=32, width=48)
    noise = draw(1, *shape, dtype=dtype)
    their_latents, their_frames = rendered_by(pipeline, noise, context, image)
    assert (their_frames.dtype, their_latents.dtype) == (dtype, dtype)
    table = sampling.noise_levels([1000, 750, 500, 250], 5.0)
    latents = sampling.denoise(
        conditioning.velocity(networks.transformer, context, encode(networks, image)),
        noise,
        exact_levels if dtype == torch.float64 else table,
        step_rule="euler",
    )
    assert relative_error(latents, their_latents) < tolerance
    frames = torch.cat(list(networks.vae.decode_chunks(latents)), dim=2)
    assert relative_error(frames / 2 + 0.5, their_frames) < tolerance


@pytest.mark.parametrize("wrong", ["mask last", "grey as black", "order", "no image"])
def test_what_is_often_got_wrong_would_show(wrong, worlds, draw, relative_error):
    """The gates can fail: each of these gives other latents, by far more than any tolerance."""
    _, networks = worlds(torch.float64)
    image, context = picture(48, 32), draw(1, 512, DIT.text_dim)
    noise = draw(1, 16, 3, 4, 6)
    right = encode(networks, image)
    mask, latents = right.y_BCTHW[:, :4], right.y_BCTHW[:, 4:]
    black = conditioning.first_frame(signed(image), TARGET)
    frames = conditioning.pad_in_time(black, 9)
    frames[:, :, 1:] = -1
    y = {
        "mask last": torch.cat([mask.flip(2), latents], dim=1),
        "grey as black": torch.cat([mask, networks.vae.encode(frames)], dim=1),
        "order": torch.cat([latents, mask], dim=1),
        "no image": torch.cat([mask, torch.zeros_like(latents)], dim=1),
    }[wrong]

    def velocity(condition):
        asked = conditioning.velocity(networks.transformer, context, condition)
        return asked(noise, torch.tensor([937.5]))

    assert relative_error(velocity(Condition(y, right.image_tokens_BIG)), velocity(right)) > 1e-3


def test_image_tokens_come_before_text_tokens_in_diffusers(worlds, in_fp64, draw, relative_error):
    """It takes the last 512 rows for text; ours are given apart, so none can be taken for text."""
    pipeline, networks = worlds(torch.float64)
    latents, context = draw(1, 36, 3, 4, 6), draw(1, 512, DIT.text_dim)
    tokens, timestep = draw(1, 5, 32), torch.tensor([625.0])
    expected = pipeline.transformer(latents, timestep, context, tokens).sample
    assert (
        relative_error(networks.transformer(latents, timestep, context, tokens), expected) < 1e-12
    )
    swapped = networks.transformer(latents, timestep, context, tokens.flip(-1))
    assert relative_error(swapped, expected) > 1e-3
