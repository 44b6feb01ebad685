"""One of several gloo processes that render together: shared_tokens.py FOLDER.

Each computes the same alone first, and writes what it found to FOLDER; the test judges it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from models import conditioning, config, sampling, sequence_parallel, transformer

# 45 tokens: one process has 23 of them, the other 22.
LATENTS = (16, 3, 6, 10)
TEXT = config.TransformerConfig(
    dim=48, ffn_dim=80, num_heads=4, num_layers=3, text_dim=40, text_len=24, freq_dim=32
)
IMAGE = config.TransformerConfig(
    dim=48,
    ffn_dim=80,
    num_heads=4,
    num_layers=3,
    in_dim=36,
    text_dim=40,
    text_len=24,
    freq_dim=32,
    image_dim=32,
)
LEVELS = sampling.noise_levels([1000, 750, 500, 250], 5.0)


def build(sizes: config.TransformerConfig, dtype: torch.dtype) -> transformer.WanTransformer:
    """Of one dtype's weights, whatever they compute in."""
    torch.manual_seed(0)
    network = transformer.WanTransformer(sizes).to(torch.bfloat16)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, dtype))
    return network.requires_grad_(False)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def forward(network: transformer.WanTransformer, *, batch: int) -> torch.Tensor:
    sizes, dtype = network.config, network.dtype
    latents = draw(batch, sizes.in_dim, *LATENTS[1:], dtype=dtype)
    context = draw(batch, sizes.text_len, sizes.text_dim, dtype=dtype)
    image = None if sizes.image_dim is None else draw(batch, 9, sizes.image_dim, dtype=dtype)
    return network(latents, torch.tensor([937.5, 625.0][:batch]), context, image)


def render(network: transformer.WanTransformer, step_rule: sampling.StepRule) -> torch.Tensor:
    """Four steps, as `worker.pipeline` makes them."""
    sizes, dtype = network.config, network.dtype
    context = draw(1, sizes.text_len, sizes.text_dim, dtype=dtype)
    noise, generator = sampling.initial_noise(5, LATENTS, "cpu")
    if sizes.image_dim is None:

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return network(x, t, context)
    else:
        condition = conditioning.Condition(
            draw(1, 20, *LATENTS[1:], dtype=torch.float32),
            draw(1, 9, sizes.image_dim, dtype=dtype),
        )
        velocity = conditioning.velocity(network, context, condition)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.inference_mode():
        return sampling.denoise(
            velocity, noise.to(wide), LEVELS, step_rule=step_rule, generator=generator
        )


RUNS = {
    "forward of two": lambda network: forward(network, batch=2),
    "euler": lambda network: render(network, "euler"),
    "renoise": lambda network: render(network, "renoise"),
}


def compare(tokens: sequence_parallel.Tokens) -> dict[str, dict[str, float]]:
    """Relative errors, by task, dtype and run; of bf16 to what fp64 makes of the same weights."""
    found = {}
    for task, sizes in (("t2v", TEXT), ("i2v", IMAGE)):
        exact = build(sizes, torch.float64)
        for dtype in (torch.float64, torch.bfloat16):
            alone, shared = build(sizes, dtype), build(sizes, dtype)
            shared.share(tokens)
            for name, run in RUNS.items():
                truth, one, together = run(exact), run(alone), run(shared)
                found[f"{task} {str(dtype).removeprefix('torch.')} {name}"] = {
                    "alone": error(one, truth),
                    "together": error(together, truth),
                    "difference": error(together, one),
                    "sum": together.double().sum().item(),
                }
    return found


def error(some: torch.Tensor, truth: torch.Tensor) -> float:
    assert some.shape == truth.shape
    return ((some.double() - truth.double()).norm() / truth.double().norm()).item()


def outlive(tokens: sequence_parallel.Tokens) -> str:
    """What one hears of a forward whose partner is killed."""
    network = build(TEXT, torch.float64)
    network.share(tokens)
    if distributed.get_rank():
        network.blocks[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), 9))
    try:
        forward(network, batch=1)
    except sequence_parallel.ExchangeError as lost:
        return str(lost)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    tokens = sequence_parallel.SharedTokens()
    (folder / f"{rank}.json").write_text(json.dumps(compare(tokens)))
    (folder / f"{rank}.lost").write_text(outlive(tokens))
    os._exit(0)  # the end of a group without its other process may be an abort


if __name__ == "__main__":
    main()
