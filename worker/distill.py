"""`rushes distill`: reads a training's file, loads what it names, trains, exports.

One process, or several started by torchrun; then each sees one GPU and holds its share.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs import errors, images, preset_values, prompt_row, readers, settings
from models import checkpoint, conditioning, config, layout, quantization
from models.distillation import (
    adapters,
    checkpointing,
    cost,
    course,
    encoding,
    export,
    pairs,
    precision,
    processes,
    progress,
    roles,
    saving,
    sharding,
    trainer,
    tuner,
)
from worker import device, group, probes
from worker import errors as worker_errors
from worker import settings as worker_settings_module

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRESET_FILE = "preset.json"
LOCK_FILE = ".lock"
KNOWN_SIZES = {
    "Wan2.1-T2V-1.3B": config.WAN_T2V_1_3B,
    "Wan2.1-T2V-14B": config.WAN_T2V_14B,
    "Wan2.1-I2V-14B-480P": config.WAN_I2V_14B,
    "Wan2.1-I2V-14B-720P": config.WAN_I2V_14B,
}
"""As their folders are called where they are released."""
HEAD_BYTES = 65_536  # enough to tell a prompt file's format
MAX_PROBLEMS = 50
STAMP_PLACES, STAMP_BYTES = 64, 4096  # other weights differ nearly everywhere


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a run ended."""

    updates: int
    weights: Path | None
    """What was exported. None: stopped before the end, or not the first process."""
    preset: Path | None


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the command line is told on the way; in the first process only."""

    on_stage: Callable[[str], None]
    on_part: Callable[[int, int], None]
    on_update: Callable[[trainer.Update, int], None]
    """(update, of how many)"""
    on_note: Callable[[str], None]


def read(path: Path) -> course.Course:
    """A training's file; errors.FileUnusable says what is wrong with it.

    It is wrong, too, where the preset that the training ends with could not be rendered.
    """
    try:
        plan = course.read(path)
    except course.CourseError as error:
        raise errors.FileUnusable(str(error)) from error
    problems = preset_values.read(_preset(plan, plan.output / "weights"), name=path.stem).problems
    if problems:
        told = "; ".join(problems).replace("model_path", "model")
        raise errors.FileUnusable(f"{path}: {told}")
    return plan


def cost_of(plan: course.Course, known: settings.Settings, *, processes: int) -> cost.Cost:
    """What the training takes of each of so many processes; only config files are read."""
    try:
        sizes, vae_sizes = _sizes(plan, known)
        shape = _latent_shape(plan, vae_sizes)
        return cost.estimate(
            sizes,
            shape,
            plan.how,
            student_updates=plan.student_updates,
            answers=plan.regression_pairs,
            answer_steps=plan.regression_steps,
            processes=processes,
            dtype=DTYPES[plan.precision],
        )
    except ValueError as error:  # a CheckpointError too
        raise errors.FileUnusable(str(error)) from error
    except OSError as error:
        raise errors.RushesError(str(error)) from error


def _sizes(
    plan: course.Course, known: settings.Settings
) -> tuple[config.TransformerConfig, config.VAEConfig]:
    """Of the model's folder; of Wan2.1's own models also without one."""
    root = _model_folder(plan, known)
    if not root.is_dir() and root.name in KNOWN_SIZES:
        return KNOWN_SIZES[root.name], config.WAN_VAE
    files = layout.find(root, base=True, task=layout.TASKS[plan.task])
    return checkpoint.transformer_sizes(files), layout.vae_sizes(files)


def run(plan: course.Course, known: settings.Settings, told: Told) -> Done:
    """Train from the last checkpoint, or from the beginning, to the end; then export.

    Raises RushesError for whatever a person can put right.
    """
    try:
        with group.joined():
            here = _device()
            with here.faults():
                return _run(plan, known, told, here)
    except worker_errors.DeviceOutOfMemory as error:
        raise errors.RushesError(f"out of memory: {error}. {_smaller(plan)}") from error
    except (ValueError, saving.ResumeError) as error:  # a CheckpointError too
        raise errors.FileUnusable(str(error)) from error
    except (saving.SavingError, tuner.DivergedError, OSError) as error:
        raise errors.RushesError(str(error)) from error


def _smaller(plan: course.Course) -> str:
    """What of the file a person can change, so that less memory is taken."""
    how = plan.how
    ways = ["more processes (torchrun)"]
    if how.batch > 1:
        ways.append("a smaller batch with more accumulate")
    if not how.gradient_checkpointing:
        ways.append("gradient_checkpointing")
    if "full" in (how.student.weights, how.critic.weights):
        ways.append('LoRAs (student and critic with "weights": "lora")')
    return f"It takes less with {', '.join(ways)}; rushes distill --dry-run tells how much"


def _run(plan: course.Course, known: settings.Settings, told: Told, own: device.Device) -> Done:
    here = own.torch_device
    quiet = told if processes.is_first() else _QUIET
    files = layout.find(_model_folder(plan, known), base=True, task=layout.TASKS[plan.task])
    raw = _raw_examples(plan, known)
    origin = _origin(plan, files, raw)
    with _alone_in(plan.output, here):
        _check_last(plan, files, origin, quiet)  # before what takes hours
        quiet.on_stage(f"encoding {len(raw):,} prompts")
        data = _encoded(plan, files, raw, here, quiet)
        quiet.on_stage("loading the networks")
        nets = _networks(plan, files, here)
        answered = _answers(plan, files, nets, data, here, quiet)
        train = trainer.Trainer(
            plan.how, nets=nets, data=data, device=here, answered=answered, origin=origin
        )
        _resume(train, plan, quiet)
        return _train(train, plan, probes.Probes(plan, files, own, quiet.on_note), quiet)


def _train(train: trainer.Trainer, plan: course.Course, drawn: probes.Probes, quiet: Told) -> Done:
    """A student that is done is exported, also where its checkpoint could not be written."""
    quiet.on_stage("training")
    _tell_of_grace(quiet)
    unsaved = None
    with _stop_on_signals() as asks_to_stop:
        watcher = progress.Watcher(
            on_update=lambda update: quiet.on_update(update, plan.student_updates),
            on_saved=lambda path: quiet.on_note(f"checkpoint {path}"),
            on_trouble=quiet.on_note,
            on_probe=drawn.write,
            asks_to_stop=asks_to_stop,
        )
        try:
            is_done = progress.run(train, plan, watcher)
        except saving.SavingError as error:
            if not progress.is_done(train, plan):
                raise
            quiet.on_note(f"{error}; the student is exported all the same")
            unsaved, is_done = error, True
    if not is_done:
        return Done(updates=train.updates, weights=None, preset=None)
    quiet.on_stage("exporting")
    weights = export.write(train, plan.output)
    preset = None if weights is None else _write_preset(plan, weights)
    if unsaved is not None:
        raise unsaved
    return Done(updates=train.updates, weights=weights, preset=preset)


@contextmanager
def _alone_in(folder: Path, here: torch.device) -> Iterator[None]:
    """Two trainings in one folder would remove each other's checkpoints. FileUnusable for a second.

    The kernel lets go of the lock when we end, however that happens; the empty file stays.
    """
    with contextlib.ExitStack() as stack:
        is_taken = processes.is_first() and _is_taken(folder, stack)
        if processes.is_true_anywhere(is_taken, here):
            raise errors.FileUnusable(f"another rushes distill works in {folder}")
        yield


def _is_taken(folder: Path, stack: contextlib.ExitStack) -> bool:
    """By another process; else it is ours until `stack` ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((folder / LOCK_FILE).open("a"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems have no locks
        pass
    return False


def _tell_of_grace(told: Told) -> None:
    if group.has_little_grace():
        told.on_note(
            "torchrun kills its processes 30 s after Ctrl-C or SIGTERM, unless it is told "
            f"otherwise: {group.GRACE_VARIABLE}=1800 in the environment gives time for a checkpoint"
        )


_QUIET = Told(
    on_stage=lambda _stage: None,
    on_part=lambda _done, _count: None,
    on_update=lambda _update, _count: None,
    on_note=lambda _text: None,
)


def _device() -> device.Device:
    """Of several GPUs the one of this process."""
    here = device.current(worker_settings_module.WorkerSettings())
    if not here.is_cuda:
        return here
    own = torch.device("cuda", torch.cuda.current_device())
    return dataclasses.replace(here, torch_device=own)


def _model_folder(plan: course.Course, known: settings.Settings) -> Path:
    """A folder, if its path is absolute, or the name of one among the models."""
    return known.models_dir / plan.model


def _raw_examples(plan: course.Course, known: settings.Settings) -> list[encoding.Raw]:
    """The rows of the prompt file; every line that cannot be used is told at once."""
    found, problems = [], []
    with plan.prompts.open("rb") as stream:
        kind = readers.detect_format(plan.prompts.name, stream.read(HEAD_BYTES))
        stream.seek(0)
        for row in readers.read(stream, format=kind, max_problems=MAX_PROBLEMS):
            if isinstance(row, errors.Problem):
                problems.append(row)
                continue
            try:
                found.append(_raw(row, plan, known))
            except (images.ImageError, ValueError) as error:
                problems.append(errors.Problem(line=row.line, message=str(error)))
    if problems:
        raise errors.InvalidInput(str(plan.prompts), problems)
    return found


def _raw(row: prompt_row.PromptRow, plan: course.Course, known: settings.Settings) -> encoding.Raw:
    if plan.task == "t2v":
        if row.image is not None:
            raise ValueError('image: the task is "t2v", which has none')
        return encoding.Raw(prompt=row.prompt)
    if row.image is None:
        raise ValueError('image is missing: the task is "i2v"')
    source = row.image
    fetched = images.fetch(source, base=plan.prompts.parent, config=known)

    def read_again() -> Tensor:
        again = images.fetch(source, base=plan.prompts.parent, config=known)
        return torch.from_numpy(np.array(images.decode_rgb(again.data)))

    return encoding.Raw(prompt=row.prompt, image_key=fetched.sha256, image=read_again)


def _encoded(
    plan: course.Course,
    files: layout.ModelFiles,
    raw: list[encoding.Raw],
    here: torch.device,
    told: Told,
) -> encoding.StoredExamples:
    encoder = encoding.Encoder(
        folder=plan.output / "examples",
        model=_stamp((*files.text_encoder, *files.vae, *files.image_encoder)),
        target=conditioning.Target(
            width=plan.target_width,
            height=plan.target_height,
            num_frames=plan.target_video_length,
            crops=True,
        ),
        load=lambda: checkpoint.load_surroundings(files, device=here, dtype=DTYPES[plan.precision]),
    )
    paths = encoder.encode([*raw, encoding.Raw(prompt=plan.negative_prompt)], told.on_part)
    if here.type == "cuda":
        torch.cuda.empty_cache()
    text_len = checkpoint.transformer_sizes(files).text_len
    return encoding.StoredExamples(
        paths[:-1],
        paths[-1],
        text_len=text_len,
        latent_shape=_latent_shape(plan, layout.vae_sizes(files)),
    )


def _latent_shape(plan: course.Course, sizes: config.VAEConfig) -> tuple[int, int, int, int]:
    return sizes.latent_shape(
        num_frames=plan.target_video_length, height=plan.target_height, width=plan.target_width
    )


def _stamp(paths: Sequence[Path]) -> str:
    """Names files by size and time, so that other ones are not taken for them."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _weights_stamp(paths: Sequence[Path]) -> str:
    """Names weights by their bytes at many places: a copy is the same, wherever it lies."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as stream:
            for place in range(STAMP_PLACES):
                stream.seek(size * place // STAMP_PLACES)
                digest.update(stream.read(STAMP_BYTES))
    return digest.hexdigest()[:16]


def _origin(
    plan: course.Course, files: layout.ModelFiles, raw: list[encoding.Raw]
) -> dict[str, str | int | None]:
    """What decides the numbers beside the method, as checkpoints remember it."""
    start = plan.student_start
    asked = json.dumps([(each.prompt, each.image_key) for each in raw])
    found: dict[str, str | int | None] = {
        "teacher_weights": _weights_stamp(files.transformer),
        "student_start": None if start is None else start.name,
        "precision": plan.precision,
        "negative_prompt": plan.negative_prompt,
        "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
    }
    if plan.how.regression is not None:
        found |= {name: getattr(plan, name) for name in ("regression_pairs", "regression_steps")}
    return found


def _networks(plan: course.Course, files: layout.ModelFiles, here: torch.device) -> roles.Roles:
    """Networks are read to the host one by one, and each is moved or spread before the next."""
    dtype = DTYPES[plan.precision]

    def start(who: str) -> nn.Module:
        path = plan.student_start if who == "student" else None
        read = files
        if path is not None:
            read = layout.find(files.root, transformer_file=path)
        network = _loaded(read, torch.float32)
        if dtype == torch.bfloat16:
            precision.compute_in_bf16(network)
        return network

    def prepare(network: nn.Module, switch: adapters.Switch | None) -> None:
        if plan.how.gradient_checkpointing:
            checkpointing.checkpoint_blocks(network, switch)
        if processes.count() > 1:
            sharding.shard(network, here.type)
        else:
            network.to(here)

    return roles.of_teacher(_loaded(files, dtype), plan.how, start=start, prepare=prepare)


def _loaded(files: layout.ModelFiles, dtype: torch.dtype) -> nn.Module:
    network = checkpoint.load_transformer(files, device="cpu", dtype=dtype)
    if quantization.quantized_layers(network):
        path = files.transformer[0]
        raise errors.FileUnusable(f"{path} is quantized; a training needs bf16 or fp32 weights")
    return network


def _answers(
    plan: course.Course,
    files: layout.ModelFiles,
    nets: roles.Roles,
    data: encoding.StoredExamples,
    here: torch.device,
    told: Told,
) -> pairs.Pairs | None:
    """What the teacher is asked before the training."""
    if plan.how.regression is None:
        return None
    examples = [path.name for path in data.files]  # each named by what it was made of
    asked = [_weights_stamp(files.transformer), plan.precision, examples, data.latent_shape]
    wanted = pairs.Pairs(
        folder=plan.output / "answers",
        made_from=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        how=plan.how,
        steps=plan.regression_steps,
        count=plan.regression_pairs,
    )
    told.on_stage(f"asking the teacher {plan.regression_pairs:,} times")
    batch = plan.how.batch
    pairs.ask(nets.teacher, wanted, data=data, batch=batch, report=told.on_part, device=here)
    return wanted


def _check_last(
    plan: course.Course,
    files: layout.ModelFiles,
    origin: dict[str, str | int | None],
    told: Told,
) -> None:
    """Whether the newest checkpoint, if there is one, may be gone on from."""
    for path in saving.complete(plan.output)[-1:]:
        shape = _latent_shape(plan, layout.vae_sizes(files))
        if "prompts" in saving.check(path, plan.how, origin=origin, latent_shape=shape):
            told.on_note(f"{path} was trained with other prompts; it goes on with the new ones")


def _resume(train: trainer.Trainer, plan: course.Course, told: Told) -> None:
    saved = saving.complete(plan.output)
    if saved:
        saving.load(train, saved[-1])
        told.on_note(f"going on from {saved[-1]}")


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """The first SIGTERM or Ctrl-C asks to stop after this batch, a second Ctrl-C stops at once."""
    asked = False
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_preset(plan: course.Course, weights: Path) -> Path:
    """A preset that renders what was exported, beside it."""
    path = plan.output / PRESET_FILE
    text = json.dumps(_preset(plan, weights), indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


def _preset(plan: course.Course, weights: Path) -> dict[str, Any]:
    is_lora = plan.how.student.weights == "lora"
    described = plan.description or f"Distilled from {Path(plan.model).name}"
    base: dict[str, Any] = {
        "description": described[:200],
        "task": plan.task,
        "model_path": plan.model,
        "target_width": plan.target_width,
        "target_height": plan.target_height,
        "target_video_length": plan.target_video_length,
        "fps": plan.fps,
    }
    return export.preset(base, plan.how, path=weights.resolve(), is_lora=is_lora)
