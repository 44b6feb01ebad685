"""Train the tiny transformers by flow matching, as Wan's own were: many steps, with guidance."""

# B batch, C channels, T frames, H W rows columns, I image tokens

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import config, transformer
from models.tiny import clips, loop, recipes, replay, words

HIDDEN = ("self_attn", "cross_attn", "ffn")  # matrices inside the blocks


def train(
    network: transformer.WanTransformer,
    recipe: recipes.Teacher,
    seed: int,
    *,
    data: clips.Clips,
    contexts: words.Contexts,
    path: Path,
    say: loop.Say,
    name: str,
) -> transformer.WanTransformer:
    """Train, or go on training, and return the running average of the weights."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))  # type: ignore[no-untyped-call]  # torch's stub
    matrices, rest = optimizers(network, recipe)
    replay.make(network)
    device = network.patch_embedding.weight.device

    def step(number: int) -> Mapping[str, float]:
        dice = loop.dice(seed, number)
        rows = [dice.randrange(len(data.scenes)) for _ in range(recipe.batch)]
        scenes, latents, y, tokens = data.take(rows, device)
        context = contexts.choose(scenes, dice, empty_share=recipe.empty_share).to(device)
        factor = loop.warm_cosine(number, recipe.steps, warmup=recipe.warmup)
        loop.set_rate(matrices, recipe.matrix_rate * factor)
        loop.set_rate(rest, recipe.rate * factor)
        condition = (y, tokens) if len(y) else None
        generator = loop.generator(seed, number, device)
        error = flow_loss(network, latents, context, condition, recipe.shift, generator)
        network.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]  # torch's stub
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        matrices.step()
        rest.step()
        average.update_parameters(network)
        return {"loss": error.item()}

    parts: dict[str, loop.Stateful] = {
        "network": network,
        "average": average,
        "matrices": matrices,
        "rest": rest,
    }
    loop.run(name, parts, step, steps=recipe.steps, path=path, say=say)
    trained = cast(transformer.WanTransformer, average.module)
    return trained.eval().requires_grad_(requires_grad=False)


def optimizers(
    network: nn.Module, recipe: recipes.Teacher
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_hidden = parameter.ndim == 2 and any(part in name for part in HIDDEN)
        (matrices if is_hidden else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=recipe.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return muon, adam


def flow_loss(
    network: transformer.WanTransformer,
    clean_BCTHW: Tensor,
    context_BSD: Tensor,
    condition: tuple[Tensor, Tensor] | None,
    shift: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity eps - x0 at noise levels that are shifted upwards."""
    device = clean_BCTHW.device
    noise = torch.randn(clean_BCTHW.shape, generator=generator, device=device)
    u = torch.rand(len(clean_BCTHW), generator=generator, device=device)
    sigma_B = shift * u / (1 + (shift - 1) * u)
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * clean_BCTHW + sigma * noise
    if condition is None:
        predicted = network(noisy, 1000 * sigma_B, context_BSD)
    else:
        y, tokens = condition
        predicted = network(torch.cat([noisy, y], dim=1), 1000 * sigma_B, context_BSD, tokens)
    error: Tensor = (predicted - (noise - clean_BCTHW)).square().mean()
    return error


def new(sizes: config.TransformerConfig, seed: int) -> transformer.WanTransformer:
    """A network before training: the head starts at zero, so it first predicts no velocity."""
    torch.manual_seed(seed)
    network = transformer.WanTransformer(sizes)
    nn.init.zeros_(network.head.head.weight)
    nn.init.zeros_(network.head.head.bias)
    return network


def for_images(
    base: transformer.WanTransformer, sizes: config.TransformerConfig, seed: int
) -> transformer.WanTransformer:
    """An image-to-video network that at first does what a text-to-video network does.

    The new input channels and what is read from the image tokens start at zero.
    """
    torch.manual_seed(seed)
    network = transformer.WanTransformer(sizes)
    known = base.state_dict()
    patches = torch.zeros_like(network.patch_embedding.weight)
    patches[:, : sizes.out_dim] = known.pop("patch_embedding.weight")
    missing, _ = network.load_state_dict(known | {"patch_embedding.weight": patches}, strict=False)
    with torch.no_grad():
        for name in missing:
            if "v_img" in name:
                network.get_parameter(name).zero_()
    return network
