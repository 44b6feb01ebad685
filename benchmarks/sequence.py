"""What sharing the tokens of a video costs, counted: `python -m benchmarks.sequence`.

A full-size forward of one process among N, on `meta`: nothing is computed or sent. The operations
say how evenly the work is shared, the bytes what crosses the links between GPUs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks, traffic
from models import config, sequence_parallel

EXCHANGE = "alltoall_base_"


@contextmanager
def one_of(processes: int) -> Iterator[None]:
    """torch.distributed, as the last of so many finds it; the others are not there."""
    distributed.init_process_group(
        "fake", rank=processes - 1, world_size=processes, store=FakeStore()
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


def share(
    sizes: config.TransformerConfig, latents: tuple[int, ...], processes: int
) -> dict[str, Any]:
    """Of one forward, by one process."""
    with one_of(processes), torch.device("meta"), torch.no_grad():
        network = networks.on_meta(sizes)
        network.share(sequence_parallel.SharedTokens())
        context = torch.randn(1, sizes.text_len, sizes.text_dim, dtype=torch.bfloat16)
        arguments = torch.randn(1, *latents), torch.ones(1), context
        counted = traffic.count(lambda: network(*arguments))
        with FlopCounterMode(display=False) as counter:
            network(*arguments)
    # Each exchange reads what it sends and writes as much; its own part stays where it is.
    exchanged = counted.by_operation[EXCHANGE] / 2
    return {
        "processes": processes,
        "flops": counter.get_total_flops(),
        "sent_bytes": round(exchanged * (processes - 1) / processes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    for name, sizes in networks.SIZES.items():
        for shape, latents in networks.LATENTS.items():
            for processes in options.processes:
                facts = {"model": name, "size": shape, "processes": processes}
                try:
                    facts |= share(sizes, latents, processes)
                except ValueError as error:
                    facts["error"] = str(error)
                sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
