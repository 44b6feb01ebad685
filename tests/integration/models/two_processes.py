"""One of several gloo processes that train together: two_processes.py FOLDER WEIGHTS DTYPE CHANGES.

Writes what every process has to say to FOLDER; the test compares it with one process alone.
"""

import errno
import itertools
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed

from models import config
from models.distillation import (
    checkpointing,
    examples,
    export,
    method,
    pairs,
    processes,
    roles,
    saving,
    sharding,
    trainer,
)
from models.tiny import make
from worker import group

SIZES = config.TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=6, freq_dim=32
)
GLOBAL_BATCH = 4
RATE = 1e-3
UPDATES = 3


def build(folder: Path, weights: str, dtype: torch.dtype, **changes) -> trainer.Trainer:
    how = method.Method(
        student=method.student_tuning(weights, learning_rate=RATE, rank=4),
        critic=method.critic_tuning(weights, learning_rate=RATE, rank=4),
        batch=GLOBAL_BATCH // processes.count(),
        **{"ratio": 2, "ema_start": 1, **changes},
    )
    teacher = make.random_transformer(SIZES, torch.Generator().manual_seed(0)).to(dtype)

    def prepare(network, switch):
        checkpointing.checkpoint_blocks(network, switch)
        sharding.shard(network, "cpu")

    generator = torch.Generator().manual_seed(1)
    data = examples.MemoryExamples(
        torch.randn(7, 6, 16, generator=generator),
        torch.randn(1, 6, 16, generator=generator),
        latent_shape=(16, 2, 4, 4),
    )
    nets = roles.of_teacher(teacher, how, prepare=prepare)
    answered = None
    if how.regression is not None:
        wanted = {"folder": folder / "answers", "made_from": "a", "steps": 4, "count": 5}
        answered = pairs.Pairs(how=how, **wanted)
        told = {"batch": how.batch, "report": lambda done, count: None}
        pairs.ask(nets.teacher, answered, data=data, **told)
    return trainer.Trainer(how, nets=nets, data=data, answered=answered)


def run(folder: Path, weights: str, dtype: torch.dtype, **changes) -> None:
    """Train, stop in an update, save, go on; then go on from what was saved, and export."""
    train = build(folder, weights, dtype, **changes)
    updates = [train.step() for _ in range(UPDATES)]
    save_where_the_first_cannot(train, folder)
    asked = itertools.count(1)
    with pytest.raises(trainer.Stopped):
        train.step(lambda: next(asked) == 3)
    saving.save(train, folder)
    straight = train.step()
    resumed = build(folder, weights, dtype, **changes)
    saving.load(resumed, saving.complete(folder)[-1])
    after = resumed.step()
    assert replace(after, seconds=0) == replace(straight, seconds=0)
    export.write(resumed, folder)
    if processes.is_first():
        facts = [asdict(update) for update in [*updates, straight]]
        (folder / "updates.json").write_text(json.dumps(facts))


def save_where_the_first_cannot(train: trainer.Trainer, folder: Path) -> None:
    """Every process is told, and none waits for another."""
    full = OSError(errno.ENOSPC, "No space left on device")
    told = "No space left" if processes.is_first() else "another process failed"
    with (
        mock.patch.object(saving, "_write_facts", side_effect=full),
        pytest.raises(saving.SavingError, match=told),
    ):
        saving.save(train, folder)
    assert not saving.complete(folder)


def main() -> None:
    folder, weights, dtype, changes = sys.argv[1:]
    torch.set_num_threads(1)
    count = int(os.environ["WORLD_SIZE"])
    if count > 1:
        meeting = f"file://{folder}/meeting"
        rank = int(os.environ["RANK"])
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    run(Path(folder), weights, getattr(torch, dtype), **json.loads(changes))
    if distributed.is_initialized():
        group.leave()


if __name__ == "__main__":
    main()
