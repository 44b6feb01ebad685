"""What a distillation takes on a GPU against what is derived: `python -m benchmarks.distill`.

Random weights made on the device, random text and noise: nothing is learnt, only time and memory
are looked at. The numbers beside them are those of `rushes distill CONFIG --dry-run`, which are of
an average update; `forwards` are those of this one, and `tflops` come from them.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks import gpu_common as gpu
from benchmarks import networks
from models import attention, config, transformer
from models.distillation import adapters, checkpointing, cost, examples, method, precision, roles
from models.distillation.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=networks.SIZES, default="1.3B")
    parser.add_argument("--weights", choices=["full", "lora"], action="append")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--ratio", type=int, default=5, help="critic updates per student update")
    parser.add_argument("--out", type=Path, help="a line of JSON per student update")
    options = parser.parse_args()
    attention.use(attention.TorchKernels(attention.choose(attention.this_machine()).backends))
    for weights in options.weights or ["full", "lora"]:
        how = method.Method(
            student=method.student_tuning(weights),
            critic=method.critic_tuning(weights),
            ratio=options.ratio,
        )
        sizes = networks.SIZES[options.model]
        derived = cost.estimate(sizes, networks.LATENTS["480p"], how, student_updates=1)
        for facts in measured(sizes, how, options.updates):
            walked = cost.walked_in(how, int(facts["update"]))
            forwards = cost.forwards_per_update(how, walked=walked)
            line = json.dumps(
                {
                    "model": options.model,
                    "weights": weights,
                    **facts,
                    "derived_gb": derived.device_bytes / 1e9,
                    "derived_seconds": derived.seconds_per_update,
                    "forwards": forwards,
                    "tflops": forwards * derived.flops_per_forward / facts["seconds"] / 1e12,
                }
            )
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as stream:
                    stream.write(line + "\n")


def measured(
    sizes: config.TransformerConfig, how: method.Method, updates: int
) -> Iterator[dict[str, float]]:
    """Seconds and peak of each update; the first one also warms up."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train = Trainer(how, nets=three_networks(sizes, how), data=lessons(sizes), device=gpu.DEVICE)
    for _ in range(updates):
        began = time.perf_counter()
        update = train.step()
        torch.cuda.synchronize()
        yield {
            "update": update.number,
            "seconds": time.perf_counter() - began,
            "exit_step": update.exit_step,
            "peak_gb": gpu.peak_gb(),
        }


def three_networks(sizes: config.TransformerConfig, how: method.Method) -> roles.Roles:
    """As `rushes distill` has them: a bf16 teacher, fp32 masters that compute in bf16."""

    def start(_name: str) -> nn.Module:
        network = gpu.random_transformer(sizes).float()
        precision.compute_in_bf16(network)
        return network

    def prepare(network: nn.Module, switch: adapters.Switch | None) -> None:
        checkpointing.checkpoint_blocks(network, switch)

    teacher: transformer.WanTransformer = gpu.random_transformer(sizes)
    return roles.of_teacher(teacher, how, start=start, prepare=prepare)


def lessons(sizes: config.TransformerConfig) -> examples.MemoryExamples:
    texts = torch.randn(4, sizes.text_len, sizes.text_dim, dtype=torch.bfloat16)
    return examples.MemoryExamples(texts, texts[:1], latent_shape=networks.LATENTS["480p"])


if __name__ == "__main__":
    main()
