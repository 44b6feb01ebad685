"""How the tiny models are trained: `recipe.json`, checked."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models import config, sampling
from models.tiny import words

DEFAULT = Path(__file__).with_name("recipe.json")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps of the autoencoder's training that are alike; the rate falls by half a cosine."""

    steps: int
    frames: int
    batch: int
    rate: float
    last_rate: float
    kl_weight: float
    """0: latents are their means, without noise."""
    part: Literal["both", "decoder"] = "both"
    """"decoder": latents stay what they are, and clips that are encoded already stay good."""
    passing_share: float | None = None
    """Of clips with a pillar; None: the autoencoder's."""
    blur: float = 0.0
    """Most noise that is added to latents, in their own spread: generated ones are never exact."""


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    base_dim: int
    passing_share: float
    phases: tuple[Phase, ...]

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and its place in the phase."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)

    @property
    def sizes(self) -> config.VAEConfig:
        """Statistics of the latents are not known before they are trained."""
        return config.VAEConfig(
            base_dim=self.base_dim,
            num_res_blocks=1,
            latent_mean=(0.0,) * 16,
            latent_std=(1.0,) * 16,
        )


@dataclass(frozen=True, kw_only=True)
class Clips:
    text_to_video: int
    image_to_video: int
    passing_share: float


@dataclass(frozen=True, kw_only=True)
class Teacher:
    steps: int
    batch: int
    rate: float
    """Of AdamW."""
    matrix_rate: float
    """Of Muon, scaled to AdamW's."""
    warmup: int
    shift: float
    empty_share: float
    """Of the clips that are shown without their prompt, for guidance."""
    ema: float


@dataclass(frozen=True, kw_only=True)
class Transformer:
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int

    @property
    def text_to_video(self) -> config.TransformerConfig:
        sizes = dataclasses.asdict(self)
        return config.TransformerConfig(
            **sizes, text_dim=words.sizes().dim, text_len=words.TEXT_LEN
        )

    @property
    def image_to_video(self) -> config.TransformerConfig:
        image_dim = config.TINY_IMAGE_ENCODER.dim
        return dataclasses.replace(self.text_to_video, in_dim=36, image_dim=image_dim)


@dataclass(frozen=True, kw_only=True)
class Reflow:
    """How a student begins: from `pairs` of noise and what the teacher makes of it."""

    pairs: int
    teacher_steps: int
    steps: int
    batch: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Rounds of states where the student goes by itself, and steps of learning from each."""

    rounds: int
    states: int
    collect_batch: int = 200
    teacher_steps: int
    """Of the whole way; from a state the teacher takes those that are left."""
    steps: int
    batch: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Student:
    """Distillation to four steps; `rank` goes with weights "lora"."""

    denoising_step_list: tuple[int, ...]
    rollout: sampling.StepRule
    weights: Literal["full", "lora"]
    reflow: Reflow
    on_policy: OnPolicy | None
    rank: int | None = None
    updates: int
    batch: int
    rate: float
    critic_rate: float
    ratio: int
    guidance: float
    regression: float
    ema: float
    share: float = 1.0
    """Of what was learnt that is kept in the end; the rest is the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int
    autoencoder: Autoencoder
    clips: Clips
    transformer: Transformer
    text_to_video: Teacher
    image_to_video: Teacher
    student: Student
    lora: Student
    student_i2v: Student
    lora_i2v: Student


def load(path: Path = DEFAULT) -> Recipe:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    autoencoder = values["autoencoder"]
    phases = tuple(Phase(**phase) for phase in autoencoder.pop("phases"))
    return Recipe(
        seed=values["seed"],
        autoencoder=Autoencoder(**autoencoder, phases=phases),
        clips=Clips(**values["clips"]),
        transformer=Transformer(**values["transformer"]),
        text_to_video=Teacher(**values["text_to_video"]),
        image_to_video=Teacher(**values["image_to_video"]),
        student=_student(values["student"]),
        lora=_student(values["lora"]),
        # Only what is done in another way for image-to-video is said twice.
        student_i2v=_student({**values["student"], **values["student_i2v"]}),
        lora_i2v=_student({**values["lora"], **values["lora_i2v"]}),
    )


def _student(values: dict[str, Any]) -> Student:
    own = values["on_policy"]
    on_policy = None if own is None else OnPolicy(**own)
    steps = tuple(values["denoising_step_list"])
    reflow = Reflow(**values["reflow"])
    return Student(
        **{**values, "denoising_step_list": steps, "reflow": reflow, "on_policy": on_policy}
    )
