"""Keys of LoRA files in the spellings that are in use -> native parameters of the network.

A key is a prefix, a module and an ending: `diffusion_model.` `blocks.0.self_attn.q`
`.lora_down.weight`. Modules may have their native names, diffusers' names, or either of them with
underscores in place of dots (kohya, musubi).
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from models import weight_names


class Role(enum.Enum):
    """What a tensor of a LoRA file does to a parameter of the network."""

    DOWN = "down"
    """The half that comes first, [rank, in]."""
    UP = "up"
    """The other half, [out, rank]."""
    ALPHA = "alpha"
    """Scales the pair by alpha / rank."""
    DELTA = "delta"
    """Is added as it is."""
    UP_BIAS = "up_bias"
    """Is added, scaled as its module's pair."""


@dataclass(frozen=True)
class Ending:
    text: str
    role: Role
    parameter: str = "weight"
    """Which parameter of the module is meant."""


PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
DELTAS = (
    (".diff", "weight"),
    (".diff_b", "bias"),
    (".diff_m", "modulation"),
)
UP_BIASES = (".lora_up.bias", ".lora_B.bias", ".lora_B.default.bias")
ENDINGS = (
    *(Ending(down, Role.DOWN) for down, _ in PAIRS),
    *(Ending(up, Role.UP) for _, up in PAIRS),
    *(Ending(text, Role.DELTA, parameter) for text, parameter in DELTAS),
    *(Ending(text, Role.UP_BIAS, "bias") for text in UP_BIASES),
    Ending(".alpha", Role.ALPHA),
)
PREFIXES = (
    "base_model.model.",  # PEFT; one of the others may follow
    "pipe.dit.",  # DiffSynth
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",  # diffusers: Wan2.2's second one, alone in its file
    "unet.",
    "model.",
    "lora_unet__",  # VideoX-Fun
    "lora_unet_",
    "lycoris_",
)
ONLY_SAFETENSORS = "LoRA files are read as .safetensors only"
FOR_IMAGES = ("_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder")


def for_images(names: Iterable[str]) -> list[str]:
    """Those of what Wan2.1 has for its image encoder, in all spellings; as keys or parameters."""
    return sorted(name for name in names if any(part in name for part in FOR_IMAGES))


def not_for_images(*, takes_image: bool) -> str:
    """Why a LoRA is of no use to a network that has no parameters for images."""
    if takes_image:
        return "All of it is for Wan2.1's image encoder, which Wan2.2 does not have"
    return (
        "It was made for image-to-video, the network is for text-to-video: "
        "take a LoRA that was made for text-to-video"
    )


class Names:
    """The native parameters of one network, under every name a LoRA file may give their module."""

    def __init__(self, parameters: Iterable[str]) -> None:
        self._parameters = frozenset(parameters)
        self._modules: dict[str, str] = {}
        for parameter in sorted(self._parameters):
            module = parameter.rpartition(".")[0]
            foreign = weight_names.rename(f"{module}.", weight_names.TRANSFORMER)[:-1]
            for name in (module, foreign):
                for spelling in (name, name.replace(".", "_")):
                    known = self._modules.setdefault(spelling, module)
                    # diffusers' norm2 is native norm3; native norm2 has no parameters.
                    assert known == module, f"{spelling} could be {known} or {module}"

    def find(self, key: str) -> tuple[str, Role] | None:
        """The native parameter that a key is about and what it does to it; None: not known."""
        for ending in ENDINGS:
            if not key.endswith(ending.text):
                continue
            module = self._modules.get(_without_prefix(key.removesuffix(ending.text)))
            parameter = f"{module}.{ending.parameter}"
            if module is not None and parameter in self._parameters:
                return parameter, ending.role
        return None


def _without_prefix(module: str) -> str:
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    return module
