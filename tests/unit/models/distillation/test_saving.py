"""A checkpoint is whole or not there, and what comes after it is what would have come anyway."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from models.distillation import course, progress, saving, trainer

MODES = [
    {"student": "full"},
    {"student": "lora"},
    {"student": "lora", "critic": "full", "sgmd": 0.1},
    {"student": "full", "ida": 0.97, "rollout": "renoise", "accumulate": 2},
]


def tensors(train):
    return dict(saving._tensors(train))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_resumed_training_takes_the_same_next_update_to_the_bit(train, mode, tmp_path):
    straight = train(**mode)
    straight.step()
    straight.step()
    saving.save(straight, tmp_path)
    expected = straight.step()

    resumed = train(**mode)
    saving.load(resumed, saving.complete(tmp_path)[-1])
    made = resumed.step()
    assert made.number == expected.number == 3
    assert (made.student_loss, made.critic_loss) == (expected.student_loss, expected.critic_loss)
    now, then = tensors(resumed), tensors(straight)
    assert {f"average.{name}" for name in resumed.student.trained} < now.keys()
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_an_update_that_was_stopped_goes_on_to_the_same_bits(train, tmp_path, stop_at):
    """Before the second batch of its student update, and before that of its critic update."""
    mode = {"student": "lora", "accumulate": 2, "batch": 1, "ratio": 1}
    straight, stopped = train(**mode), train(**mode)
    expected = [straight.step(), straight.step()][-1]
    stopped.step()
    asked = itertools.count(1)
    with pytest.raises(trainer.Stopped):
        stopped.step(lambda: next(asked) == stop_at)
    assert stopped.updates == 1
    assert stopped.underway.actions == (stop_at - 1) // 2
    resumed = train(**mode)
    saving.load(resumed, saving.save(stopped, tmp_path))
    for one in (stopped, resumed):
        made = one.step()
        assert dataclasses.replace(made, seconds=0) == dataclasses.replace(expected, seconds=0)
        now, then = tensors(one), tensors(straight)
        assert all(torch.equal(now[name], then[name]) for name in then)


@pytest.mark.parametrize(("stop_at", "saved"), [(2, ["update_000000"]), (4, ["update_000001"])])
def test_who_asks_to_stop_gets_one_checkpoint(train, tmp_path, stop_at, saved):
    """Within the first update; and when it was just saved, before the second is begun."""
    values = {"model": "m", "prompts": "p", "output": str(tmp_path), "save_every": 1, "ratio": 1}
    asked, told = itertools.count(1), []
    watcher = progress.Watcher(
        on_update=lambda _update: None,
        on_saved=told.append,
        on_trouble=told.append,
        on_probe=lambda *_: None,
        asks_to_stop=lambda: next(asked) == stop_at,
    )
    beginning = train("lora", ratio=1)
    assert not progress.run(beginning, course.from_values(values), watcher)
    assert [path.name for path in told] == saved
    saving.load(beginning, told[-1])
    assert (beginning.updates, beginning.underway.actions) == ((0, 1) if stop_at == 2 else (1, 0))
    at_once = dataclasses.replace(watcher, asks_to_stop=lambda: True)
    assert not progress.run(beginning, course.from_values(values), at_once)
    assert len(told) == 1, "what was loaded is not written again"


@pytest.mark.parametrize("stop_at", [2, 3])
def test_a_stop_without_a_checkpoint_is_an_error(train, tmp_path, monkeypatch, stop_at):
    """Within an update, and after it."""

    def fails(*_arguments, **_options):
        raise saving.SavingError(tmp_path, "No space left on device")

    monkeypatch.setattr(saving, "save", fails)
    asked = itertools.count(1)
    watcher = progress.Watcher(
        on_update=lambda _update: None,
        on_saved=lambda _path: None,
        on_trouble=lambda _text: None,
        on_probe=lambda *_: None,
        asks_to_stop=lambda: next(asked) == stop_at,
    )
    values = {"model": "m", "prompts": "p", "output": str(tmp_path), "ratio": 1}
    with pytest.raises(saving.SavingError):
        progress.run(train("lora", ratio=1), course.from_values(values), watcher)
    assert next(asked) == stop_at + 1


def test_an_update_that_was_begun_is_ended_though_fewer_are_wanted_now(train, tmp_path):
    beginning = train("lora", ratio=1)
    beginning.step()
    asked = itertools.count(1)
    with pytest.raises(trainer.Stopped):
        beginning.step(lambda: next(asked) == 2)
    values = {"model": "m", "prompts": "p", "output": str(tmp_path), "student_updates": 1}
    quiet = progress.Watcher(
        on_update=lambda _update: None,
        on_saved=lambda _path: None,
        on_trouble=lambda _text: None,
        on_probe=lambda *_: None,
    )
    assert progress.run(beginning, course.from_values(values), quiet)
    assert (beginning.updates, beginning.underway.actions) == (2, 0)


def test_only_the_newest_are_kept(train, tmp_path):
    beginning = train()
    for updates in (1, 2, 3):
        beginning.updates = updates
        saving.save(beginning, tmp_path, keep=2)
    assert [path.name for path in saving.complete(tmp_path)] == ["update_000002", "update_000003"]


def test_another_method_is_not_continued_with(train, tmp_path):
    path = saving.save(train(), tmp_path)
    with pytest.raises(saving.ResumeError, match=r"guidance was 6.0, now 4.0.*another output"):
        saving.load(train(guidance=4.0), path)


def test_another_tuning_is_named_by_its_key(train, tmp_path):
    path = saving.save(train("lora"), tmp_path)
    other = train("lora")
    tuning = dataclasses.replace(other.how.critic, betas=(0.5, 0.9))
    other.how = dataclasses.replace(other.how, critic=tuning)
    told = r"otherwise: critic.betas was \[0.9, 0.999\], now \[0.5, 0.9\]\. Use"
    with pytest.raises(saving.ResumeError, match=told):
        saving.load(other, path)


def test_a_training_goes_on_with_a_smaller_learning_rate(train, tmp_path, how):
    """As a diverged one is told to; the rate is the new one, the rest as it was."""
    path = saving.save(train(), tmp_path)
    slow = how()
    tuning = {"learning_rate": 1e-5, "clip": 1.0}
    slow = dataclasses.replace(
        slow,
        student=dataclasses.replace(slow.student, **tuning),
        critic=dataclasses.replace(slow.critic, **tuning),
    )
    made = train()
    resumed = trainer.Trainer(slow, nets=made.nets, data=made.data)
    before = {name: weight.clone() for name, weight in resumed.student.tensors()}
    saving.load(resumed, path)
    resumed.step()
    changes = [
        float((weight - before[name]).abs().max())
        for name, weight in resumed.student.tensors()
        if name.startswith("weight.")
    ]
    assert 0.5e-5 < max(changes) < 2e-5  # Adam's first step is the rate


def test_another_size_is_not_continued_with(train, tmp_path):
    beginning = train()
    path = saving.save(beginning, tmp_path)
    other = train()
    other.data.latent_shape = (*other.data.latent_shape[:3], 6)
    with pytest.raises(saving.ResumeError, match=r"latent_shape was .*, now .*6\].*another output"):
        saving.load(other, path)
    facts = json.loads((path / saving.FACTS_FILE).read_text())
    del facts["latent_shape"]  # as older versions wrote it
    (path / saving.FACTS_FILE).write_text(json.dumps(facts))
    saving.load(other, path)


def test_other_weights_are_not_continued_with(train, tmp_path):
    """As far as a checkpoint says which ones it was trained with."""
    beginning = train()
    beginning.origin = {"teacher_weights": "a1", "negative_prompt": "x" * 99, "student_start": None}
    path = saving.save(beginning, tmp_path)
    saving.load(beginning, path)
    other = train()
    other.origin = beginning.origin | {"teacher_weights": "b2", "negative_prompt": "grey"}
    told = (
        r"negative_prompt was x{60}\.\.\., now grey; teacher_weights was a1, now b2\. Use another"
    )
    with pytest.raises(saving.ResumeError, match=told):
        saving.load(other, path)
    facts = json.loads((path / saving.FACTS_FILE).read_text())
    del facts["origin"]["teacher_weights"], facts["origin"]["negative_prompt"]
    (path / saving.FACTS_FILE).write_text(json.dumps(facts))
    saving.load(other, path)
    del facts["origin"], facts["underway"]  # as older versions wrote it
    (path / saving.FACTS_FILE).write_text(json.dumps(facts))
    saving.load(other, path)


def test_another_split_of_the_batch_is_continued_with(train, tmp_path):
    path = saving.save(train(batch=2), tmp_path)
    saving.load(train(batch=1, accumulate=2), path)


@pytest.mark.parametrize("victim", [".metadata", "__0_0.distcp", "training.json"])
def test_a_damaged_checkpoint_says_so(train, tmp_path, victim):
    path = saving.save(train(), tmp_path)
    os.truncate(path / victim, (path / victim).stat().st_size // 2)
    with pytest.raises(saving.ResumeError, match=r"cannot be read.*remove that folder to begin"):
        saving.load(train(), path)


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_named(train, tmp_path):
    beginning = train("lora")
    saving.save(beginning, tmp_path)
    beginning.updates = 1
    path = saving.save(beginning, tmp_path)
    file = path / "__0_0.distcp"
    written = file.read_bytes()
    weight = max(tensors(beginning).values(), key=lambda each: each.norm())
    place = written.index(weight.numpy().tobytes())  # where torch does not notice
    file.write_bytes(written[:place] + bytes([written[place] ^ 0x40]) + written[place + 1 :])
    told = r"distcp is not what was written.*remove that folder to go on from update_000000$"
    with pytest.raises(saving.ResumeError, match=told):
        saving.load(beginning, path)
    file.write_bytes(written)
    (path / "__0.sha256").unlink()  # as older versions wrote it
    saving.load(beginning, path)


def test_a_checkpoint_that_is_overwritten_is_not_lost_with_us(train, tmp_path, monkeypatch):
    """Killed, and failed, after it gave its name away."""
    beginning = train("lora")
    path = saving.save(beginning, tmp_path)
    rename = type(path).rename

    def fails(self, target, *, error):
        if self.name.endswith(".part"):
            raise error
        return rename(self, target)

    for error in (KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")):
        monkeypatch.setattr(type(path), "rename", functools.partialmethod(fails, error=error))
        with pytest.raises((KeyboardInterrupt, saving.SavingError)):
            saving.save(beginning, tmp_path, keep=1)
        monkeypatch.undo()
        assert saving.complete(tmp_path) == [path]
        saving.load(beginning, path)
    assert saving.save(beginning, tmp_path, keep=1) == path
    assert list((tmp_path / saving.FOLDER).iterdir()) == [path]


def test_what_does_not_fit_on_the_disk_leaves_the_checkpoint_before(train, tmp_path, monkeypatch):
    beginning = train()
    beginning.step()
    before = saving.save(beginning, tmp_path)
    beginning.step()
    usage, parts = shutil.disk_usage, tmp_path / saving.FOLDER

    def disk_usage(path):
        assert list(parts.glob(".*.part")), "what was written counts as used"
        return usage(path)

    monkeypatch.setattr(saving.shutil, "disk_usage", disk_usage)
    size = sum(each.nbytes for each in tensors(beginning).values())
    told = f"update_000002 could not be written.*takes {size:,} bytes, [0-9,]+ are free"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(saving.SavingError, match=told):
            saving.save(beginning, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / saving.FOLDER).iterdir()) == [before]
    saving.load(train(), before)
    after = saving.save(beginning, tmp_path)
    assert saving.complete(tmp_path) == [before, after]


@pytest.mark.parametrize("step", ["_write_facts", "_sync"])
def test_a_disk_that_fails_after_the_tensors_is_told_as_any_other(
    train, tmp_path, monkeypatch, step
):
    def fails(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, step, fails)
    with pytest.raises(saving.SavingError, match=r"could not be written.*Input/output error"):
        saving.save(train(), tmp_path)
    assert not list((tmp_path / saving.FOLDER).glob(".*"))


def test_what_killed_processes_left_is_removed_by_the_next_save(train, tmp_path):
    left = tmp_path / saving.FOLDER / ".update_000007.part"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    saved = saving.save(train(), tmp_path)
    assert list((tmp_path / saving.FOLDER).iterdir()) == [saved]


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
from pathlib import Path
from models import config
from models.distillation import examples, method, roles, saving, trainer
from models.tiny import make

sizes = config.TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=6, freq_dim=32
)
how = method.Method(batch=1, ratio=1)
data = examples.MemoryExamples(
    torch.zeros(3, 6, 16), torch.zeros(1, 6, 16), latent_shape=(16, 1, 2, 2)
)
teacher = make.random_transformer(sizes, torch.Generator().manual_seed(0))
train = trainer.Trainer(how, nets=roles.of_teacher(teacher, how), data=data)
train.step()
saving.save(train, Path(sys.argv[1]))
train.step()
real, count = os.fsync, 0
def dies(handle):  # when the tensors are written and the rest is not
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dies
saving.save(train, Path(sys.argv[1]))
"""


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / saving.FOLDER).iterdir())
    assert names == [".update_000002.part", "update_000001"]
    assert [path.name for path in saving.complete(tmp_path)] == ["update_000001"]
