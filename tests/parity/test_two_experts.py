"""Wan2.2's pairs against diffusers' pipelines with two transformers, from the same folder.

diffusers writes the folder; a worker loads it and renders with its own switch between the two.
"""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from jobs import looks
from models import config, sampling, text_encoder
from models.tiny import make
from worker import components, device

TEXT = config.TINY_TEXT_ENCODER
SIZES = {
    task: config.TransformerConfig(
        dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_dim=channels, text_dim=TEXT.dim
    )
    for task, channels in (("t2v", 16), ("i2v", 36))
}
WIDTH, HEIGHT, NUM_FRAMES = 48, 32, 5


@pytest.fixture
def pipeline_of(transformer_pair, vae_pair, four_steps):
    """diffusers' pipeline for a task; the two transformers have other weights."""

    def build(task, boundary_ratio):
        high, _ = transformer_pair(torch.float64, sizes=SIZES[task], seed=1)
        low, _ = transformer_pair(torch.float64, sizes=SIZES[task], seed=2)
        vae, _ = vae_pair(torch.float64)
        kind = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}[task]
        pipeline = kind(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=four_steps(),
            transformer=high,
            transformer_2=low,
            boundary_ratio=boundary_ratio,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


def save(pipeline, root):
    """As diffusers lays a Wan2.2 model out."""
    pipeline.save_pretrained(root)
    make.write_tokenizer(root / "tokenizer")
    text_encoder.build_network(TEXT).save_pretrained(root / "text_encoder")


def look_of(task, boundary_step_index):
    return looks.Look(
        task=task,
        model_path="pair",
        denoising_step_list=[1000, 750, 500, 250],
        step_rule="euler",
        sample_shift=5.0,
        width=WIDTH,
        height=HEIGHT,
        num_frames=NUM_FRAMES,
        fps=16,
        boundary_step_index=boundary_step_index,
    )


def ours(folder, look, image, noise, levels):
    """Latents and frames of a worker on this folder, and the context that it encoded."""
    cpu = device.Device(torch_device=torch.device("cpu"), dtype=torch.float64, name="CPU")
    warm = components.Components(models_dir=folder, home=folder / "home", device=cpu)
    model = warm.model_for(look)
    context = model.encode_text("a red fox")
    condition = None
    if image is not None:
        condition = model.condition("fox", torch.from_numpy(np.array(image)), look)
    with torch.inference_mode(), model.denoiser(context, condition, look) as denoiser:
        latents = sampling.denoise(
            denoiser,
            noise,
            levels,
            step_rule=look.step_rule,
            on_step=lambda step, _steps: denoiser.select(step),
        )
        frames = torch.cat(list(model.decode_chunks(latents, on_tile=lambda *_: None)), dim=2)
    return latents, frames, context


@pytest.fixture
def compare(
    pipeline_of, pipelines_in_fp64, exact_levels, draw, tmp_path, relative_error, rendered_by
):
    """Relative errors of latents and of frames."""

    def errors(task, boundary_ratio, boundary_step_index):
        pipeline = pipeline_of(task, boundary_ratio)
        save(pipeline, tmp_path / "pair")
        rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
        picture = np.stack([rows * 7, columns * 5, rows + columns], axis=-1).astype(np.uint8)
        image = Image.fromarray(picture) if task == "i2v" else None
        noise = draw(1, 16, (NUM_FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
        look = look_of(task, boundary_step_index)
        latents, frames, context = ours(tmp_path, look, image, noise, exact_levels)
        their_latents, their_frames = rendered_by(pipeline, noise, context, image)
        assert their_frames.dtype == their_latents.dtype == torch.float64
        return (
            relative_error(latents, their_latents),
            relative_error(frames / 2 + 0.5, their_frames),
        )

    return errors


@pytest.mark.parametrize(
    ("task", "boundary_ratio", "boundary_step_index"),
    [
        ("t2v", 0.875, 2),  # as in Wan2.2-T2V-A14B-Diffusers
        ("i2v", 0.9, 2),  # as in Wan2.2-I2V-A14B-Diffusers
        ("t2v", 0.95, 1),
        ("t2v", 0.8, 3),
    ],
)
def test_a_pair_agrees_in_fp64(task, boundary_ratio, boundary_step_index, compare):
    """The steps are 1000, 937.5, 833.3 and 625: those from the ratio on are high noise."""
    assert max(compare(task, boundary_ratio, boundary_step_index)) < 1e-12


def test_another_boundary_would_show(compare):
    """The gate can fail: one step by the other transformer gives another video."""
    assert min(compare("t2v", 0.875, 1)) > 1e-3
