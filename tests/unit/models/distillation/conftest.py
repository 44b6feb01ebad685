"""A transformer of Wan's architecture small enough to train for some steps in a test."""

import pytest
import torch

from models import config
from models.distillation import examples, method, roles, trainer
from models.tiny import make

SIZES = config.TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=6, freq_dim=32
)
IMAGE_SIZES = config.TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=6, freq_dim=32,
    in_dim=36, image_dim=20,
)  # fmt: skip
LATENT_SHAPE = (16, 2, 4, 4)
FAST = 1e-3  # a learning rate at which a few updates are seen


@pytest.fixture
def teacher():
    """`teacher(sizes)`: always the same weights."""

    def build(sizes=SIZES):
        return make.random_transformer(sizes, torch.Generator().manual_seed(0))

    return build


@pytest.fixture
def data():
    """Seven prompts in memory; with `image=True` seven first frames."""

    def build(*, image=False, count=7):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        extra = {}
        if image:
            extra = {
                "y_NCTHW": normal(count, 20, *LATENT_SHAPE[1:]),
                "image_tokens_NIG": normal(count, 5, 20),
            }
        return examples.MemoryExamples(
            normal(count, 6, 16), normal(1, 6, 16), latent_shape=LATENT_SHAPE, **extra
        )

    return build


@pytest.fixture
def how():
    """`how("lora", guidance=1)`: a fast method with what the test wants changed."""

    def build(student="full", critic=None, **changes):
        return method.Method(
            student=method.student_tuning(student, learning_rate=FAST, rank=4, alpha=8.0)
            if student == "lora"
            else method.student_tuning(learning_rate=FAST),
            critic=method.critic_tuning(critic or student, learning_rate=FAST, rank=4, alpha=8.0),
            **{"batch": 2, "ema_start": 1, "ratio": 2, **changes},
        )

    return build


@pytest.fixture
def train(teacher, data, how):
    """`train("lora", ratio=1)`: a trainer at its beginning."""

    def build(student="full", critic=None, *, image=False, **changes):
        described = how(student, critic, **changes)
        sizes = IMAGE_SIZES if image else SIZES
        nets = roles.of_teacher(teacher(sizes), described)
        return trainer.Trainer(described, nets=nets, data=data(image=image))

    return build
