"""What `reflow` and `on_policy` share: a student under AdamW, kept as a running average."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.distillation import roles
from models.tiny import loop

EMA = 0.99


def learn(
    student: roles.Role,
    error: Callable[[int], Tensor],
    *,
    rate: float,
    steps: int,
    path: Path,
    say: loop.Say,
) -> None:
    """Train the role's weights on `error(step)`, or go on; they end as their running average."""
    weights = nn.ParameterList(student.trained.values())
    average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(EMA))  # type: ignore[no-untyped-call]  # torch's stub
    optimizer = torch.optim.AdamW(
        weights.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0
    )

    def step(number: int) -> Mapping[str, float]:
        loss = error(number)
        loop.set_rate(optimizer, rate * loop.warm_cosine(number, steps, warmup=50))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stub
        nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(weights)
        return {"loss": loss.item()}

    parts: dict[str, loop.Stateful] = {
        "weights": weights,
        "average": average,
        "optimizer": optimizer,
    }
    loop.run(path.stem, parts, step, steps=steps, path=path, say=say)
    with torch.no_grad():
        for weight, mean in zip(weights.parameters(), average.parameters(), strict=True):
            weight.copy_(mean)
