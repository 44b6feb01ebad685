"""From file to device by so many readers: `python -m benchmarks.loading [--folder FOLDER]`.

A transformer in bf16 with random weights is written, dropped from the system's cache, and loaded
as a worker loads it, from the disk and once more from the cache; each number of readers in turn.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks import measuring, networks
from models import checkpoint, config
from models.tiny import folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=networks.SIZES, default="1.3B")
    parser.add_argument("--blocks", type=int, help="instead of all of them")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = measuring.Report(options.out)
    report.add("machine", measuring.machine())
    with tempfile.TemporaryDirectory(prefix="rushes-loading-", dir=options.folder) as name:
        path = Path(name) / "transformer.safetensors"
        network = networks.on_meta(_sizes(options.model, options.blocks))
        folders.save({name: _random(t) for name, t in network.state_dict().items()}, path)
        found: dict[tuple[int, str], list[float]] = {}
        for _ in range(options.rounds):
            for readers in options.readers:
                measuring.drop_from_cache(path)
                for source in ("disk", "cache"):
                    rate = path.stat().st_size / 1e9 / _seconds(path, readers, device)
                    found.setdefault((readers, source), []).append(rate)
    for (readers, source), rates in found.items():
        report.add(f"{readers} from {source}", measuring.spread(rates, "gb_per_s"))


def _sizes(model: str, blocks: int | None) -> config.TransformerConfig:
    sizes = networks.SIZES[model]
    return sizes if blocks is None else dataclasses.replace(sizes, num_layers=blocks)


def _random(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, dtype=torch.bfloat16)


def _seconds(path: Path, readers: int, device: torch.device) -> float:
    began = time.perf_counter()
    tensors = checkpoint.read_tensors([path])
    with mock.patch.object(checkpoint, "READERS", readers):
        owned = checkpoint.owned(tensors, device, dict.fromkeys(tensors, torch.bfloat16))
    measuring.synchronize()
    took = time.perf_counter() - began
    assert len(owned) == len(tensors)
    return took


if __name__ == "__main__":
    main()
