"""A student as files that the renderer takes, under native names, in bf16.

    distill_models/distill_model.safetensors    full weights
    loras/distill_lora.safetensors              a LoRA, in LightX2V's keys, without alpha

What was written is read back by the renderer's own readers: nothing missing, nothing unused.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models import checkpoint, errors, lora, safetensors_files, transformer, transformer_files
from models.distillation import adapters, method, processes, trainer
from models.safetensors_files import Entry

FULL_FILE = transformer_files.DISTILLED_FILES[0]
LORA_FILE = Path("loras") / "distill_lora.safetensors"
PREFIX = "diffusion_model."


def write(train: trainer.Trainer, folder: Path, *, averaged: bool = True) -> Path | None:
    """Write the student, by default its moving average, and read it back.

    Called by every process; the first one writes and gets the path. Raises OSError where it cannot
    be written, CheckpointError should the renderer refuse it.
    """
    trained: Mapping[str, Tensor] = train.student.trained
    if averaged and train.average is not None:
        trained = train.average.tensors
    tuning, network = train.how.student, train.nets.student.network
    dtype = torch.bfloat16 if tuning.weights == "full" else torch.float32
    whole = {}
    for name, tensor in trained.items():
        gathered = _whole(tensor)  # by all processes, one after the other; the first keeps them
        if processes.is_first():
            whole[name] = gathered.detach().to("cpu", dtype)
    if not processes.is_first():
        return None
    metadata = facts(train.how, updates=train.updates, averaged=averaged)
    if tuning.weights == "full":
        return _checked(
            whole, folder / FULL_FILE, metadata, lambda path: _check_full(path, network)
        )
    factors = _folded(whole, tuning.scale)
    return _checked(
        factors, folder / LORA_FILE, metadata, lambda path: _check_lora(path, network, whole)
    )


def _checked(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    check: Callable[[Path], None],
) -> Path:
    """A file appears under its name when the renderer was seen to take it."""
    fresh = path.with_name(f".new.{path.name}")
    try:
        _save(tensors, fresh, metadata)
        check(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def facts(how: method.Method, *, updates: int, averaged: bool) -> dict[str, str]:
    """What a person who meets the file needs to know to render it, for its header."""
    return {
        "format": "pt",
        "made_by": "rushes distill",
        "student_updates": str(updates),
        "averaged": str(averaged and how.ema is not None).lower(),
        "denoising_step_list": json.dumps(list(how.denoising_step_list)),
        "sample_shift": f"{how.sample_shift:g}",
        "step_rule": how.rollout,
        "guidance": f"{how.guidance:g}",
        "guidance_form": "uncond + guidance * (cond - uncond)",
        "guidance_as_cond_plus_g": f"{how.guidance - 1:g}",
    }


def _folded(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """LightX2V takes the scale for 1 where there is no alpha, and so do we."""
    found = {}
    for name, factor in factors.items():
        layer, _, part = name.rpartition(".")
        key = f"{PREFIX}{layer}.lora_{part}.weight"
        found[key] = factor * scale if part == "up" else factor
    return found


def _check_lora(path: Path, network: nn.Module, factors: Mapping[str, Tensor]) -> None:
    read = lora.read(path, native_shapes(network))
    layers = {f"{name.rpartition('.')[0]}.weight" for name in factors}
    if read.parameters != layers:
        missing = sorted(layers - read.parameters)
        raise errors.LoraMismatchError(path, matched=len(read.parameters), incomplete=missing)


def native_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The transformer's parameters, without LoRAs that are trained beside them."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if adapters.MARK not in name
    }


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: Entry("BF16", tuple(tensor.shape)) for name, tensor in tensors.items()}
    with safetensors_files.create(path, entries, metadata, replace=True) as writer:
        for name, tensor in tensors.items():
            rounded = tensor.detach().cpu().bfloat16().contiguous()
            writer.write(name, rounded.flatten().view(torch.uint8).numpy().tobytes())


def _check_full(path: Path, network: nn.Module) -> None:
    """By the loader of the renderer, which wants exactly the network's tensors."""
    assert isinstance(network, transformer.WanTransformer)
    with torch.device("meta"):
        fresh = transformer.WanTransformer(network.config)
    dtypes = dict.fromkeys(fresh.state_dict(), torch.bfloat16)
    tensors = checkpoint.read_tensors([path])
    checkpoint.load_strictly(fresh, tensors, path=path, device="cpu", dtypes=dtypes)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def preset(
    base: Mapping[str, Any], how: method.Method, *, path: Path, is_lora: bool
) -> dict[str, Any]:
    """The preset that renders an exported file; `base` has model, task and size."""
    weights = {"lora_path": [str(path)]} if is_lora else {"dit_original_ckpt": str(path)}
    return {
        **base,
        "denoising_step_list": list(how.denoising_step_list),
        "step_rule": how.rollout,
        "sample_shift": how.sample_shift,
        "enable_cfg": False,
        **weights,
    }
