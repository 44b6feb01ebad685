"""How long a worker takes to switch LoRAs, with what they changed read from the disk again.

    python -m benchmarks.lora_switch [--blocks 2] [--folder DIR] [--device cuda]

Blocks of Wan2.1 14B's size with random bf16 weights, and two LoRAs of rank 64 on all their
matrices and biases. `cold` is with the files out of the system's cache, `warm` with them in it.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from benchmarks import common, measuring, networks
from models import checkpoint, config, lora_switcher, pristine, transformer

RANK = 64
LORAS = ("a", "b")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), blocks=arguments.blocks, device=torch.device(arguments.device))


def measure(folder: Path, *, blocks: int, device: torch.device) -> None:
    sizes = dataclasses.replace(config.WAN_T2V_14B, num_layers=blocks)
    base = write(folder, sizes)
    untouched = pristine.PristineFiles([base])
    network = load(base, sizes=sizes, device=device)
    switcher = lora_switcher.LoraSwitcher(network, device=device, pristine=untouched)
    gigabytes = base.stat().st_size / 1e9
    print(common.machine())
    print(f"{blocks} blocks and the rest: {gigabytes:.2f} GB of weights, on {device}")
    choices = {name: [lora_switcher.Choice(path=folder / f"{name}.safetensors")] for name in LORAS}
    steps = [("none -> a", choices["a"]), ("a -> b", choices["b"]), ("b -> none", [])]
    for cache in ("cold", "warm"):
        for name, wanted in steps:
            if cache == "cold":
                for path in folder.iterdir():
                    measuring.drop_from_cache(path)
            began = time.perf_counter()
            switcher.apply(wanted)
            measuring.synchronize()
            seconds = time.perf_counter() - began
            print(f"{cache}  {name:9}  {seconds:6.2f} s  {gigabytes / seconds:5.2f} GB/s")


def write(folder: Path, sizes: config.TransformerConfig) -> Path:
    """A base and two LoRAs for it."""
    empty = networks.on_meta(sizes).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    base = folder / "base.safetensors"
    safetensors.torch.save_file(
        {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}, base
    )
    for name in LORAS:
        safetensors.torch.save_file(lora_of(shapes), folder / f"{name}.safetensors")
    return base


def lora_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, shape in shapes.items():
        module, _, leaf = f"diffusion_model.{name}".rpartition(".")
        if leaf == "bias":
            found[f"{module}.diff_b"] = torch.randn(shape).bfloat16()
        elif leaf == "weight" and len(shape) == 2:
            found[f"{module}.lora_down.weight"] = torch.randn(RANK, shape[1]).bfloat16()
            found[f"{module}.lora_up.weight"] = torch.randn(shape[0], RANK).bfloat16()
    return found


def load(
    base: Path, *, sizes: config.TransformerConfig, device: torch.device
) -> transformer.WanTransformer:
    network = networks.on_meta(sizes)
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    tensors = checkpoint.read_tensors([base])
    checkpoint.load_strictly(network, tensors, path=base, device=device, dtypes=dtypes)
    return network


if __name__ == "__main__":
    main()
