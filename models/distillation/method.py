"""What decides the numbers of a distillation: the same method and seed train the same student."""

import math
from dataclasses import dataclass, field
from typing import Literal

from models import sampling

Weights = Literal["full", "lora"]

DEFAULT_STEPS = (1000, 750, 500, 250)
MOST = 2**16
"""Of what is repeated within an update; more would be a slip of the hand."""
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")

# Learning rate of student and critic, betas, weight decay: Self-Forcing's for full weights, those
# of LightX2V's trainer for LoRA.
_FULL = ((2e-6, 4e-7), (0.0, 0.999), 0.01)
_LORA = ((1e-4, 2e-5), (0.9, 0.999), 0.001)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a network is trained, and how."""

    weights: Weights
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float = 10.0
    """Largest norm of the gradient."""
    rank: int = 64
    alpha: float = 64.0
    """A LoRA changes its matrix by alpha / rank * up @ down."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Ends of the names of the layers that get a LoRA; only layers of the blocks are meant."""

    def __post_init__(self) -> None:
        _require(self.weights in ("full", "lora"), "weights", "be 'full' or 'lora'", self.weights)
        _require(_positive(self.learning_rate), "learning_rate", "be positive", self.learning_rate)
        is_pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(is_pair, "betas", "be two numbers from 0 to below 1", list(self.betas))
        _require(0 <= self.weight_decay < 1, "weight_decay", "be from 0 to 1", self.weight_decay)
        _require(_positive(self.clip), "clip", "be positive", self.clip)
        _require(self.rank >= 1, "rank", "be at least 1", self.rank)
        _require(_positive(self.alpha), "alpha", "be positive", self.alpha)
        _require(bool(self.targets), "targets", "name at least one layer, e.g. 'q'", [])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def student_tuning(weights: Weights = "full", **changes: object) -> Tuning:
    """The published settings for a student, with changes."""
    return _tuning(0, weights, changes)


def critic_tuning(weights: Weights = "full", **changes: object) -> Tuning:
    """The published settings for a critic, with changes."""
    return _tuning(1, weights, changes)


def _tuning(place: int, weights: Weights, changes: dict[str, object]) -> Tuning:
    rates, betas, weight_decay = _LORA if weights == "lora" else _FULL
    defaults: dict[str, object] = {
        "weights": weights,
        "learning_rate": rates[place],
        "betas": betas,
        "weight_decay": weight_decay,
    }
    return Tuning(**(defaults | changes))  # type: ignore[arg-type]  # checked by Tuning


@dataclass(frozen=True, kw_only=True)
class Method:
    """Distribution matching distillation without a GAN; see docs/distillation.md.

    Raises ValueError with the key, what it takes and what was given.
    """

    student: Tuning = field(default_factory=student_tuning)
    critic: Tuning = field(default_factory=critic_tuning)
    denoising_step_list: tuple[int, ...] = DEFAULT_STEPS
    sample_shift: float = 5.0
    rollout: sampling.StepRule = "euler"
    """The step rule of the preset that will render the student."""
    guidance: float = 6.0
    """The teacher's, as uncond + guidance * (cond - uncond); 1 is none."""
    score_shift: float = 5.0
    score_range: tuple[float, float] = (0.02, 0.98)
    """Noise levels at which the scores are compared: drawn evenly, shifted, then clamped."""
    ratio: int = 5
    """Critic updates per student update."""
    batch: int = 1
    """Samples per process at a time."""
    accumulate: int = 1
    """Batches per update."""
    ema: float | None = 0.99
    ema_start: int = 40
    """Student updates before the average begins; until then it is the student itself."""
    ida: float | None = None
    """After each student update the critic becomes ida * critic + (1 - ida) * student."""
    sgmd: float | None = None
    """Score gradient matching instead of DMD, with this weight of its correction term."""
    regression: float | None = None
    """Weight of the error to the teacher's own answers, as DMD has it beside its gradient."""
    seed: int = 0
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        sampling.noise_levels(self.denoising_step_list, self.sample_shift)
        rules = sampling.STEP_RULES
        _require(self.rollout in rules, "rollout", f"be one of {', '.join(rules)}", self.rollout)
        finite = math.isfinite(self.guidance) and self.guidance >= 1
        _require(finite, "guidance", "be at least 1, which is none", self.guidance)
        _require(_positive(self.score_shift), "score_shift", "be positive", self.score_shift)
        is_range = len(self.score_range) == 2 and 0 < self.score_range[0] < self.score_range[1] <= 1
        _require(is_range, "score_range", "be [low, high] within 0..1", list(self.score_range))
        for name in ("ratio", "batch", "accumulate"):
            given = getattr(self, name)
            _require(1 <= given <= MOST, name, f"be from 1 to {MOST}", given)
        for name in ("ema", "ida"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, "be from 0 to below 1", value)
        _require(self.ema_start >= 0, "ema_start", "be at least 0", self.ema_start)
        _require(0 <= self.seed < 2**63, "seed", "be from 0 to 2^63 - 1", self.seed)
        self._check_terms()

    def _check_terms(self) -> None:
        if self.regression is not None:
            _require(_positive(self.regression), "regression", "be positive", self.regression)
        if self.ida is not None and "lora" in (self.student.weights, self.critic.weights):
            # Mixing the factors of two LoRAs does not mix what they do.
            raise ValueError("ida mixes the weights of student and critic: both must be 'full'")
        if self.sgmd is not None:
            finite = math.isfinite(self.sgmd) and self.sgmd >= 0
            _require(finite, "sgmd", "be a weight of 0 or more, published: 0.1", self.sgmd)


def _require(holds: bool, key: str, wanted: str, given: object) -> None:
    if not holds:
        raise ValueError(f"{key} must {wanted}, got {given!r}")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
