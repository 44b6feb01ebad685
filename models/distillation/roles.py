"""Student, teacher and critic: three networks, or one with LoRAs that are switched on and off."""

# B batch, C latent channels, T H W latent frames, rows, columns, S text tokens, I image tokens,
# G width of text or image tokens

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import conditioning
from models.distillation import adapters, method, precision

Start = Callable[[str], nn.Module]
Prepare = Callable[[nn.Module, adapters.Switch | None], None]


@dataclass(frozen=True)
class Role:
    """A network as one of the three sees it."""

    network: nn.Module
    """Called as network(latents_BCTHW, timestep_B, context_BSG, image_BIG or None)."""
    trained: Mapping[str, nn.Parameter]
    """By native name; empty for the teacher. Of a LoRA its factors, `...q.down` and `...q.up`."""
    switch: adapters.Switch | None = None
    adapter: str | None = None
    """The LoRA that makes this role; None: the network as it is."""

    def velocity(
        self,
        latents_BCTHW: Tensor,
        sigma_B: Tensor,
        context_BSG: Tensor,
        condition: conditioning.Condition | None,
    ) -> Tensor:
        """Ask at noise levels `sigma_B`; in the dtype of the latents."""
        return self.at(context_BSG, condition)(latents_BCTHW, 1000 * sigma_B)

    def at(
        self, context_BSG: Tensor, condition: conditioning.Condition | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A velocity function for `sampling`, with text and image bound."""

        def velocity(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
            joined, image_BIG = latents_BCTHW, None
            if condition is not None:
                joined = condition.joined(latents_BCTHW)
                image_BIG = condition.image_tokens_BIG
            with self.switched():
                predicted: Tensor = self.network(joined, timestep_B, context_BSG, image_BIG)
            return predicted.to(latents_BCTHW.dtype)

        return velocity

    def switched(self) -> contextlib.AbstractContextManager[None]:
        if self.switch is None:
            return contextlib.nullcontext()
        return self.switch.using(self.adapter)


@dataclass(frozen=True)
class Roles:
    student: Role
    teacher: Role
    critic: Role

    @property
    def networks(self) -> list[nn.Module]:
        """Each network once."""
        roles = (self.student, self.teacher, self.critic)
        return list({id(role.network): role.network for role in roles}.values())


def of_networks(student: nn.Module, teacher: nn.Module, critic: nn.Module) -> Roles:
    """Three networks, each its own; student and critic are trained with all their weights."""
    teacher.requires_grad_(False)
    return Roles(_full(student), Role(teacher, {}), _full(critic))


def of_teacher(
    teacher: nn.Module,
    how: method.Method,
    *,
    start: Start | None = None,
    prepare: Prepare = lambda _network, _switch: None,
) -> Roles:
    """What `how` trains, from the teacher: full weights are a copy, LoRAs share its network.

    `start` makes the fp32 network that full training of "student" or "critic" begins with, in
    place of a copy of the teacher; it is asked when the network before is prepared. `prepare` is
    called once with each network and the switch of its LoRAs, before anything holds on to its
    parameters: to move or shard it, or to checkpoint its blocks.
    """
    teacher.requires_grad_(False)
    tunings = {"student": how.student, "critic": how.critic}
    full = [name for name, tuning in tunings.items() if tuning.weights == "full"]

    def ready(network: nn.Module) -> nn.Module:
        prepare(network.requires_grad_(True), None)
        return network

    # A copy is of the teacher as it is, without LoRAs and whole.
    networks = {} if start else {name: ready(_wide_copy(teacher)) for name in full}
    switch = None
    for name, tuning in tunings.items():
        if tuning.weights == "lora":
            switch = adapters.add(teacher, name, tuning, seed=how.seed)
    prepare(teacher, switch)
    if start:
        networks = {name: ready(start(name)) for name in full}

    def role(name: str) -> Role:
        if name in networks:
            return _full(networks[name])
        return Role(teacher, adapters.parameters_of(teacher, name), switch, name)

    return Roles(role("student"), Role(teacher, {}, switch), role("critic"))


def _wide_copy(teacher: nn.Module) -> nn.Module:
    """In fp32; of a teacher in bf16 one that computes in bf16."""
    is_narrow = any(weight.dtype == torch.bfloat16 for weight in teacher.parameters())
    network = copy.deepcopy(teacher).float()
    if is_narrow:
        precision.compute_in_bf16(network)
    return network


def _full(network: nn.Module) -> Role:
    return Role(network, dict(network.named_parameters()))
