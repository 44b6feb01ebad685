"""How large the networks are that are compared, and what they are asked for."""

from dataclasses import dataclass

from benchmarks import networks
from jobs import looks, presets
from models import config

MODEL = "paired"
PROMPT = (
    "a red circle moves slowly right over dark water while the camera follows it closely, "
    "evening light, a shallow depth of field, film grain"
)
SEED = 1
IMAGE_FRAMES = 81
STEPS = [1000, 750, 500, 250]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a whole text-to-video model."""

    transformer: config.TransformerConfig
    vae: config.VAEConfig
    text_encoder: config.TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the parts are."""

    sizes: Sizes
    width: int
    height: int
    num_frames: int
    """Of autoencoder and pipeline."""
    latents: tuple[int, int, int, int]
    """What the transformer is shown by itself."""
    image: tuple[int, int]
    """Rows and columns of the image that is encoded for a video of IMAGE_FRAMES."""


ON_PROCESSOR = Scale(
    sizes=Sizes(
        transformer=config.TransformerConfig(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, text_dim=1024
        ),
        vae=config.WAN_VAE,
        text_encoder=config.TextEncoderConfig(
            vocab_size=512, dim=1024, ffn_dim=2560, head_dim=64, num_heads=16, num_layers=4
        ),
    ),
    width=128,
    height=64,
    num_frames=9,
    latents=(16, 5, 32, 32),
    image=(32, 64),
)
ON_GPU = Scale(
    sizes=Sizes(
        transformer=config.WAN_T2V_1_3B,
        vae=config.WAN_VAE,
        text_encoder=config.TextEncoderConfig(
            vocab_size=512, dim=4096, ffn_dim=10240, head_dim=64, num_heads=64, num_layers=4
        ),
    ),
    width=832,
    height=480,
    num_frames=81,
    latents=networks.LATENTS["480p"],
    image=(480, 832),
)


def of(*, is_gpu: bool) -> Scale:
    return ON_GPU if is_gpu else ON_PROCESSOR


def look(scale: Scale) -> looks.Look:
    """Four steps by Euler at the levels of LightX2V's distilled models."""
    changes = {
        "model_path": MODEL,
        "denoising_step_list": STEPS,
        "step_rule": "euler",
        "width": scale.width,
        "height": scale.height,
        "num_frames": scale.num_frames,
    }
    return presets.load("tiny").look.with_changes(changes)


def spec(scale: Scale, prompt: str) -> looks.RenderSpec:
    return looks.RenderSpec(
        look=look(scale), prompt=prompt, negative_prompt=None, seed=SEED, image_key=None
    )
