"""The reference networks: diffusers and transformers, at sizes a CPU runs in a moment."""

import math

import pytest
import torch
from diffusers import image_processor as diffusers_images
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from diffusers.schedulers import scheduling_flow_match_euler_discrete
from torch import nn

from benchmarks import reference as diffusers
from models import config, sampling, transformer, vae, weight_names

DIT = config.TransformerConfig(
    dim=96, ffn_dim=160, num_heads=4, num_layers=3, freq_dim=64, text_dim=40, text_len=24
)
VAE = config.VAEConfig(base_dim=8, num_res_blocks=1)
SIGMAS = (1.0, 15 / 16, 5 / 6, 5 / 8)  # 1, 3/4, 1/2, 1/4 shifted by 5
# Each of these names fp32 itself; `.float()` is dealt with apart.
NAMES_FP32 = {
    pipeline_wan: ("torch",),  # latents
    pipeline_wan_i2v: ("torch",),  # latents, pixels of the first frame
    scheduling_flow_match_euler_discrete: ("torch", "np"),  # levels, timesteps, the step
    diffusers_images: ("np",),  # pixels
}


class Sinusoid64(nn.Module):
    """diffusers' `timesteps_proj` in fp64, written from the formula: cosines, then sines."""

    def __init__(self, width: int):
        super().__init__()
        self.half = width // 2

    def forward(self, timestep):
        steps = torch.arange(self.half, dtype=torch.float64)
        frequencies = torch.exp(-math.log(10000) * steps / self.half)
        angles = timestep.double()[:, None] * frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class Widened:
    """torch or numpy, whose fp32 is fp64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


def randomise(network, seed=0):
    """No parameter stays at its zero or one: a swapped or forgotten tensor then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim == 1 or "norm" in name:
            values = ("norm" in name and "bias" not in name) + 0.3 * noise
        elif name.endswith("scale_shift_table"):
            values = 0.5 * noise
        else:
            values = noise / math.sqrt(parameter[0].numel())
        parameter.data = values.to(parameter)
    return network.eval().requires_grad_(False)


def cast(network, dtype):
    """nn.Module's own `.to`: diffusers' logs a warning on each call."""
    return nn.Module.to(network, dtype)


def renamed(reference, ours, names):
    """The reference's tensors under our names, strictly one to one."""
    theirs = reference.state_dict()
    assert theirs.keys() == names.keys()
    ours.load_state_dict({names[name]: tensor.clone() for name, tensor in theirs.items()})
    return ours.eval().requires_grad_(False)


@pytest.fixture
def in_fp64(monkeypatch):
    """diffusers calls `.float()` in norms, residuals, upsampling and RoPE; make these exact."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def in_default_fp64():
    """The pipelines make the autoencoder's statistics and their mask in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def pipelines_in_fp64(in_fp64, in_default_fp64, monkeypatch):
    """All that diffusers' pipelines compute, from the pixels to the frames."""
    for module, names in NAMES_FP32.items():
        for name in names:
            monkeypatch.setattr(module, name, Widened(getattr(module, name)))


@pytest.fixture
def four_steps():
    """`four_steps()`: diffusers' scheduler at the levels of the distilled models."""
    return lambda: diffusers.FourSteps(shift=5.0)


@pytest.fixture(scope="session")
def exact_levels():
    """The same levels without the fp32 rounding of our table, for comparing beyond fp32."""
    timesteps = torch.tensor([1000 * sigma for sigma in SIGMAS], dtype=torch.float64)
    return sampling.NoiseLevels(sigmas=SIGMAS, timesteps=timesteps)


@pytest.fixture
def transformer_pair():
    """(reference, ours) with equal weights: `transformer_pair(torch.float64)`."""

    def build(dtype, *, sizes=DIT, exact_time=True, seed=0):
        reference = cast(randomise(diffusers.transformer(sizes), seed), dtype)
        # The cast rounded the RoPE tables as well; diffusers keeps them when it loads a checkpoint.
        reference.rope = type(reference.rope)(sizes.head_dim, sizes.patch_size, 1024)
        if exact_time:
            reference.condition_embedder.timesteps_proj = Sinusoid64(sizes.freq_dim)
        ours = transformer.WanTransformer(sizes).to(dtype)
        names = weight_names.transformer_from_diffusers(ours.state_dict())
        return reference, renamed(reference, ours, names)

    return build


@pytest.fixture
def vae_pair():
    """(reference, ours) with equal weights: `vae_pair(torch.float64)`."""

    def build(dtype, *, sizes=VAE):
        reference = cast(randomise(diffusers.autoencoder(sizes)), dtype)
        ours = vae.WanVAE(sizes).to(dtype)
        names = weight_names.vae_from_diffusers(
            ours.state_dict(), num_res_blocks=sizes.num_res_blocks
        )
        return reference, renamed(reference, ours, names)

    return build


@pytest.fixture
def draw():
    """Random tensors from one seeded generator: `draw(2, 3, dtype=torch.float64)`."""
    generator = torch.Generator().manual_seed(7)

    def tensor(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return tensor


@pytest.fixture
def rendered_by():
    """`rendered_by(pipeline, noise, context, image)`: diffusers' own `__call__` in four steps.

    Latents as after the last step, and frames in [0, 1]; their size follows from the noise.
    """

    def call(pipeline, noise, context, image=None):
        seen = []

        def on_step_end(_pipeline, _step, _timestep, tensors):
            seen.append(tensors["latents"])
            return {}

        steps, rows, columns = noise.shape[2:]
        frames = pipeline(
            **({} if image is None else {"image": image}),
            height=rows * 8,
            width=columns * 8,
            num_frames=(steps - 1) * 4 + 1,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=noise,
            prompt_embeds=context,
            output_type="pt",
            callback_on_step_end=on_step_end,
        ).frames
        return seen[-1], frames.movedim(1, 2)

    return call


@pytest.fixture
def relative_error(record_property):
    """|ours - theirs| / |theirs - its mean per channel|: a constant output hides no error.

    The channels are axis 1 of five axes, the last of three.
    """

    def measure(ours, theirs):
        ours, theirs = ours.to(torch.float64), theirs.to(torch.float64)
        assert ours.shape == theirs.shape
        axes = (2, 3, 4) if theirs.ndim == 5 else (1,)
        varying = theirs - theirs.mean(axes, keepdim=True)
        error = ((ours - theirs).norm() / varying.norm()).item()
        record_property("relative_error", error)
        print(f"relative error {error:.2e}")  # noqa: T201  # `pytest -rP` lists the numbers
        return error

    return measure
