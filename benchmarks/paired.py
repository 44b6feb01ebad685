"""Ours against diffusers, in turns: `python -m benchmarks.paired [--out FILE] [--only PART ...]`.

Both load the same random weights from one folder in diffusers' layout, and use the same kernels of
attention. On a GPU our chains are compiled; diffusers runs eagerly, but in the parts `_compiled`,
where its transformer's blocks are compiled too. There transformer and autoencoder have the size of
Wan2.1 1.3B at 480p; on a processor they are full in width, with two blocks and few tokens. `cold`
starts a process per turn.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from benchmarks import measuring, reference, scales
from models import conditioning, fusion, sampling
from worker import components, device, pipeline, resident, stopwatch
from worker.settings import WorkerSettings


class Both:
    """Our networks as a worker holds them, and diffusers' pipeline, with equal weights."""

    def __init__(
        self, models_dir: Path, scale: scales.Scale, here: device.Device, pairs: int
    ) -> None:
        self.models_dir = models_dir
        self.scale = scale
        self.here = here
        self.pairs = pairs
        # A new one each time: ours keeps the contexts of prompts that it has seen.
        self.our_prompts, self.their_prompts = (
            (f"{number} {scales.PROMPT}" for number in itertools.count()) for _ in range(2)
        )

    @cached_property
    def ours(self) -> resident.ResidentModel:
        return components.Components(
            models_dir=self.models_dir, home=self.models_dir, device=self.here
        ).model_for(scales.look(self.scale))

    @cached_property
    def theirs(self) -> diffusers.WanPipeline:
        return reference.load(
            self.models_dir / scales.MODEL, dtype=self.here.dtype, device=self.here.torch_device
        )

    @cached_property
    def theirs_compiled(self) -> diffusers.WanPipeline:
        """With the blocks of its transformer compiled, as diffusers offers it."""
        pipe = reference.load(
            self.models_dir / scales.MODEL, dtype=self.here.dtype, device=self.here.torch_device
        )
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        return pipe

    def draw(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(scales.SEED)
        return torch.randn(shape, generator=generator).to(self.here.torch_device)

    def compared(self, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict[str, Any]:
        def with_same_attention() -> Tensor:
            with measuring.same_attention():
                return theirs()

        with torch.inference_mode():
            difference = measuring.relative(ours(), with_same_attention())
            found = measuring.in_turns(ours, with_same_attention, pairs=self.pairs)
        return {**found, "relative_difference": difference}

    def transformer(self) -> dict[str, Any]:
        """One forward of the diffusion transformer; ours is compiled on a GPU, theirs eager."""
        return self._transformers(self.theirs)

    def transformer_compiled(self) -> dict[str, Any]:
        """The same with diffusers' blocks compiled."""
        return self._transformers(self.theirs_compiled)

    def _transformers(self, pipe: diffusers.WanPipeline) -> dict[str, Any]:
        dtype = self.here.dtype
        x = self.draw(1, *self.scale.latents)
        timestep = torch.tensor([937.5], device=self.here.torch_device)
        context = self.draw(1, 512, self.scale.sizes.transformer.text_dim).to(dtype)
        return self.compared(
            lambda: self.ours.networks.transformer(x, timestep, context),
            lambda: pipe.transformer(x.to(dtype), timestep, context, return_dict=False)[0],
        )

    def text(self) -> dict[str, Any]:
        """One prompt to context: the same network, fed as each of the two does."""
        return self.compared(
            lambda: self.ours.networks.text_encoder.encode(scales.PROMPT),
            lambda: self.theirs._get_t5_prompt_embeds(scales.PROMPT, max_sequence_length=512),
        )

    def decode(self) -> dict[str, Any]:
        """Latents to frames."""
        network = self.ours.networks.vae
        latents = self.draw(1, *self._latent_shape())
        mean, std = self._statistics()
        return self.compared(
            lambda: torch.cat(list(network.decode_chunks(latents)), dim=2),
            lambda: self.theirs.vae.decode(
                (latents * std + mean).to(self.here.dtype), return_dict=False
            )[0],
        )

    def encode(self) -> dict[str, Any]:
        """Frames to latents; ours in fp32 at least, theirs in the dtype of the model."""
        shape = (3, self.scale.num_frames, self.scale.height, self.scale.width)
        frames = self.draw(1, *shape).tanh()
        return self.compared(
            lambda: self.ours.networks.vae.encode(frames), lambda: self._encoded_by_them(frames)
        )

    def image(self) -> dict[str, Any]:
        """The same of one image and 80 grey frames, as image to video has it."""
        image = self.draw(1, 3, *self.scale.image).tanh()
        frames = conditioning.pad_in_time(image, scales.IMAGE_FRAMES)
        return self.compared(
            lambda: self.ours.networks.vae.encode(frames, still_from=1),
            lambda: self._encoded_by_them(frames),
        )

    def _encoded_by_them(self, frames: Tensor) -> Tensor:
        mean, std = self._statistics()
        encoded = self.theirs.vae.encode(frames.to(self.here.dtype))
        return (encoded.latent_dist.mode() - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        sizes, on = self.scale.sizes.vae, self.here.torch_device
        mean, std = (
            torch.tensor(values, device=on).view(1, -1, 1, 1, 1)
            for values in (sizes.latent_mean, sizes.latent_std)
        )
        return mean, std

    def whole(self) -> dict[str, Any]:
        """Prompt to 8-bit frames on the host: text, four steps, decoding."""
        return self.compared(self._rendered_by_us, lambda: self._rendered_by_them(self.theirs))

    def whole_compiled(self) -> dict[str, Any]:
        """The same with diffusers' blocks compiled; its text encoder and autoencoder are eager."""
        return self.compared(
            self._rendered_by_us, lambda: self._rendered_by_them(self.theirs_compiled)
        )

    def _rendered_by_us(self) -> Tensor:
        spec = scales.spec(self.scale, next(self.our_prompts))
        timings = stopwatch.Timings(self.here.synchronize)
        latents = pipeline.make_latents(
            spec, self.ours, device=self.here, timings=timings, reached=_go_on
        )
        chunks = pipeline.decode(latents, self.ours, timings=timings, reached=_go_on)
        return torch.cat(list(chunks))

    def _rendered_by_them(self, pipe: diffusers.WanPipeline) -> Tensor:
        noise, _ = sampling.initial_noise(scales.SEED, self._latent_shape(), self.here.torch_device)
        frames = pipe(
            prompt=next(self.their_prompts),
            height=self.scale.height,
            width=self.scale.width,
            num_frames=self.scale.num_frames,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=noise,
            output_type="pt",
        ).frames[0]
        return reference.to_uint8(frames)

    def _latent_shape(self) -> tuple[int, int, int, int]:
        scale = self.scale
        return self.ours.networks.vae.config.latent_shape(
            num_frames=scale.num_frames, height=scale.height, width=scale.width
        )

    def cold(self) -> dict[str, Any]:
        """From the start of a process to the first step, and to the first frame on the host."""
        found: dict[str, dict[str, list[float]]] = {"ours": {}, "theirs": {}}
        for number in range(self.pairs):
            sides = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
            for side in sides:
                for moment, at in _in_a_process(side, self.models_dir).items():
                    found[side].setdefault(moment, []).append(at)
        return {
            side: {moment: measuring.spread(times, "seconds") for moment, times in moments.items()}
            for side, moments in found.items()
        }


def _in_a_process(side: str, models_dir: Path) -> dict[str, float]:
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.cold", side, str(models_dir)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    moments = json.loads(done.stdout.splitlines()[-1])
    return {name: at - began for name, at in moments.items()}


def _go_on(_stage: str, _step: int, _steps: int) -> None:
    """Nobody stops it."""


def _machine(here: device.Device) -> dict[str, Any]:
    return {
        **measuring.machine(),
        "dtype": str(here.dtype),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parts = ("transformer", "text", "decode", "encode", "image", "whole", "cold")
    compiled = ("transformer_compiled", "whole_compiled")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=("machine", *parts, *compiled))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", default="auto", help="as of RUSHES_DTYPE")
    options = parser.parse_args()
    os.environ["RUSHES_DTYPE"] = options.dtype
    here = device.current(WorkerSettings())
    if here.is_cuda:
        fusion.run_with(fusion.Compiler(on_failure=lambda error: sys.stderr.write(f"{error}\n")))
    with tempfile.TemporaryDirectory(prefix="rushes-paired-") as name:
        folder = Path(name)
        scale = scales.of(is_gpu=here.is_cuda)
        reference.write(
            folder / scales.MODEL, scale.sizes, dtype=here.dtype, device=here.torch_device
        )
        both = Both(folder, scale, here, options.pairs)
        # On a processor nothing of ours is compiled, and theirs would take minutes to be.
        usual = (*parts, *compiled) if here.is_cuda else parts
        wanted = options.only or usual
        measuring.run_parts(
            measuring.Report(options.out),
            {"machine": lambda: _machine(here)}
            | {part: getattr(both, part) for part in (*parts, *compiled)},
            only={"machine", *wanted},
        )


if __name__ == "__main__":
    main()
