"""What a training takes, counted on networks without weights (device `meta`); nothing is measured.

Bytes are those of parameters, gradients, optimizer states, averages and activations; a kernel's
workspace, the allocator's gaps and the device's own 0.7 GB come on top.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models import config, transformer
from models.distillation import adapters, checkpointing, draws, method, roles

ADAM_BYTES = 8  # two moments in fp32
BACKWARD_FORWARDS = {"full": 2.0, "lora": 1.0}  # a frozen matrix needs no gradient of its own
EFFECTIVE_TFLOPS = (250, 400)
"""What one H100 or H200 reaches with this kind of network in bf16, from published runs."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one process. Everything is derived."""

    parameters: int
    trained_parameters: Mapping[str, int]
    tokens: int
    flops_per_forward: float
    """Of one sample."""
    forwards_per_update: float
    """Of one sample, in units of a forward; a backward is two, one with frozen weights."""
    flops_per_update: float
    static_bytes: Mapping[str, int]
    """By what takes them, after sharing them between the processes."""
    activation_bytes: int
    processes: int
    seconds_per_update: Mapping[str, float]
    """By effective TFLOP/s."""
    hours: Mapping[str, float]
    """Of the whole training, with the teacher's answers."""

    @property
    def device_bytes(self) -> int:
        return sum(self.static_bytes.values()) + self.activation_bytes


def estimate(
    sizes: config.TransformerConfig,
    latent_shape: tuple[int, int, int, int],
    how: method.Method,
    *,
    student_updates: int,
    answers: int = 0,
    answer_steps: int = 0,
    processes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Count one process's share of a training with so many equal processes.

    `answers`: those that `how.regression` takes.
    """
    nets = _networks(sizes, how, dtype)
    inputs = _inputs(sizes, latent_shape, how.batch)
    flops = count_flops(nets.teacher.network, inputs) / how.batch
    forwards = forwards_per_update(how)
    per_update = forwards * flops * how.batch * how.accumulate
    of_answers = answers / processes * answer_steps * _teacher_forwards(how) * flops
    seconds = {str(rate): per_update / (rate * 1e12) for rate in EFFECTIVE_TFLOPS}
    return Cost(
        parameters=_count(nets.teacher.network),
        trained_parameters={
            name: sum(weight.numel() for weight in role.trained.values())
            for name, role in (("student", nets.student), ("critic", nets.critic))
        },
        tokens=math.prod(sizes.grid(latent_shape)),
        flops_per_forward=flops,
        forwards_per_update=forwards,
        flops_per_update=per_update,
        static_bytes={
            name: count // processes for name, count in _static(nets, how).items() if count
        },
        activation_bytes=count_activations(nets, how, inputs),
        processes=processes,
        seconds_per_update=seconds,
        hours={
            rate: (each * student_updates + of_answers / (float(rate) * 1e12)) / 3600
            for rate, each in seconds.items()
        },
    )


def forwards_per_update(how: method.Method, *, walked: float | None = None) -> float:
    """One student update and its critic updates.

    `walked`: the forwards of the student on its way to all of their exits, where it is known
    (`walked_in`); None: the average over random exits.
    """
    if walked is None:
        walked = (1 + how.ratio) * (len(how.denoising_step_list) + 1) / 2
    again = float(how.gradient_checkpointing)
    of_student = BACKWARD_FORWARDS[how.student.weights] + again
    of_critic = BACKWARD_FORWARDS[how.critic.weights] + again
    student = 1 + _teacher_forwards(how) + of_student
    student += of_critic if how.sgmd is not None else 0
    student += 1 + of_student if how.regression is not None else 0
    critic = 1 + of_critic
    return walked + student + how.ratio * critic


def walked_in(how: method.Method, update: int) -> float:
    """The student's forwards to the exits of update 1, 2, ..., which follow from the seed."""
    batches = (how.ratio + 1) * how.accumulate
    places = [draws.Place(batch=batches * (update - 1) + number) for number in range(batches)]
    exits = [draws.Draws(how.seed, each).exit_step(len(how.denoising_step_list)) for each in places]
    return sum(step + 1 for step in exits) / how.accumulate


def _teacher_forwards(how: method.Method) -> int:
    return 1 if how.guidance == 1 else 2


def count_flops(network: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Two per multiply-add, of matrices, convolutions and attention."""
    # A bf16 forward on CUDA has it; torch would leave it out.
    more = {torch.ops.aten._addmm_activation: _product_with_gelu}
    with FlopCounterMode(display=False, custom_mapping=more) as counter, torch.no_grad():
        network(*inputs)
    return float(counter.get_total_flops())


def _product_with_gelu(
    _bias: Sequence[int], x: Sequence[int], weight: Sequence[int], **_more: object
) -> int:
    """Of these shapes."""
    return 2 * math.prod(x) * weight[-1]


def count_activations(nets: roles.Roles, how: method.Method, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that the student's loss leaves for its backward, at the worst moment.

    SGMD's goes through the critic too, whose forward stands on the student's.
    """
    seen = [(nets.student, inputs)]
    if how.sgmd is not None:
        seen.append((nets.critic, (inputs[0].clone().requires_grad_(), *inputs[1:])))
    everything = [_kept(role, given) for role, given in seen]
    if not how.gradient_checkpointing:
        return sum(everything)
    for network, switch in {role.network: role.switch for role, _ in seen}.items():
        checkpointing.checkpoint_blocks(network, switch)
    between = [_kept(role, given) for role, given in seen]
    num_blocks = len(nets.student.network.blocks)  # type: ignore[arg-type]  # a ModuleList
    # One block is computed again at a time.
    again = max(whole - ends for whole, ends in zip(everything, between, strict=True))
    return sum(between) + again // num_blocks


def _kept(role: roles.Role, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps of one forward, beside the weights themselves."""
    weights = {id(weight.untyped_storage()) for weight in role.network.parameters()}
    kept: dict[int, tuple[Any, int]] = {}
    sizes: config.TransformerConfig = role.network.config  # type: ignore[assignment]
    num_tokens = math.prod(sizes.grid(inputs[0].shape[1:]))

    def keep(tensor: Tensor) -> Tensor:
        # Attention's matrix is never stored on a GPU; `meta` computes as if it were.
        storage = tensor.untyped_storage()
        if num_tokens not in tensor.shape[-1:] and id(storage) not in weights:
            kept[id(storage)] = storage, storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), role.switched():
        role.network(*inputs)
    return sum(count for _, count in kept.values())


def _networks(
    sizes: config.TransformerConfig, how: method.Method, dtype: torch.dtype
) -> roles.Roles:
    with torch.device("meta"):
        teacher = transformer.WanTransformer(sizes)
    for name, parameter in teacher.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, dtype))
    return roles.of_teacher(teacher, how)


def _inputs(
    sizes: config.TransformerConfig, latent_shape: tuple[int, int, int, int], batch: int
) -> tuple[Tensor, ...]:
    def of(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, device="meta")

    image = () if sizes.image_dim is None else (of(257, sizes.image_dim),)
    return (
        of(sizes.in_dim, *latent_shape[1:]),
        torch.empty(batch, device="meta"),
        of(sizes.text_len, sizes.text_dim),
        *image,
    )


def _static(nets: roles.Roles, how: method.Method) -> dict[str, int]:
    found = {"frozen weights": 0, "trained weights": 0, "gradients": 0, "optimizer": 0}
    for network in nets.networks:
        for parameter in network.parameters():
            if not parameter.requires_grad:
                found["frozen weights"] += parameter.nbytes
                continue
            found["trained weights"] += parameter.nbytes
            found["gradients"] += parameter.nbytes
            found["optimizer"] += parameter.numel() * ADAM_BYTES
    if how.ema is not None:
        found["average"] = sum(weight.nbytes for weight in nets.student.trained.values())
    return found


def _count(network: nn.Module) -> int:
    """Parameters, without LoRAs."""
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if adapters.MARK not in name
    )
