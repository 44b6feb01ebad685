"""rushes and diffusers on a GPU in turns: one process, the same shapes and attention kernels."""

import copy
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_common as gpu
from benchmarks import measuring, networks
from models import attention, config, fusion, transformer, vae


def transformers(_report: measuring.Report) -> dict[str, Any]:
    """1.3B, one forward at 480p; ours also with GELU apart from its product."""
    import diffusers

    with gpu.emptied(), torch.inference_mode(), gpu.compiled_chains() as failures:
        sizes = config.WAN_T2V_1_3B
        ours = gpu.random_transformer(sizes)
        with torch.device("meta"):
            theirs = diffusers.WanTransformer3DModel(
                num_attention_heads=sizes.num_heads,
                attention_head_dim=sizes.head_dim,
                ffn_dim=sizes.ffn_dim,
                num_layers=sizes.num_layers,
                freq_dim=sizes.freq_dim,
            )
        theirs = networks.filled(theirs.to(gpu.BF16))
        # Rope's tables are no parameters, so they were lost on `meta`.
        theirs.rope = type(theirs.rope)(sizes.head_dim, (1, 2, 2), 1024).to(gpu.DEVICE)
        x, time, context = gpu.inputs()
        backends = list(attention.choose(attention.this_machine()).backends)

        def run_ours() -> Any:
            return ours(x, time, context)

        def run_apart() -> Any:
            with mock.patch.object(transformer, "has_gelu_in_product", return_value=False):
                return ours(x, time, context)

        def run_theirs() -> Any:
            with sdpa_kernel(backends or list(SDPBackend.__members__.values()), set_priority=True):
                return theirs(x.to(gpu.BF16), time, context, return_dict=False)

        works = {"rushes": run_ours, "gelu_apart": run_apart, "diffusers": run_theirs}
        results = {name: work() for name, work in works.items()}
        found = gpu.in_turns(works, rounds=4)
        return {
            "seconds": found,
            "times_as_fast": _ratio(found["diffusers"], found["rushes"]),
            "gelu_in_product_times_as_fast": _ratio(found["gelu_apart"], found["rushes"]),
            "gelu_in_product_to_apart": measuring.relative(
                results["rushes"], results["gelu_apart"]
            ),
            "failures": failures,
            "kernels": gpu.attempted(lambda: gpu.kernels_ms(run_ours, most=16)),
        }


def autoencoders(_report: measuring.Report) -> dict[str, Any]:
    """81 frames of 832x480 decoded in bf16, ours with compiled chains and eagerly.

    Ours in the dtypes that a worker holds, with the encoder in fp32. Peaks are those with the other
    one's weights on the host.
    """
    import diffusers

    with gpu.emptied(), gpu.compiled_chains() as failures:
        ours = networks.filled(networks.autoencoder())
        vae.to_channels_last(ours)
        theirs = diffusers.AutoencoderKLWan().to(device=gpu.DEVICE, dtype=gpu.BF16).eval()
        theirs.requires_grad_(requires_grad=False)
        latents = torch.randn(1, *networks.LATENTS["480p"], device=gpu.DEVICE)

        def run_ours() -> None:
            for _chunk in ours.decode_chunks(latents):
                pass

        def run_eagerly() -> None:
            with fusion.running_with(fusion.eagerly):
                run_ours()

        def run_theirs() -> None:
            theirs.decode(latents.to(gpu.BF16), return_dict=False)

        works = {"rushes": run_ours, "eagerly": run_eagerly, "diffusers": run_theirs}
        owners: dict[str, nn.Module] = {"rushes": ours, "eagerly": ours, "diffusers": theirs}
        with torch.inference_mode():
            first_seconds = measuring.once(run_ours)
        peaks = {name: _peak_alone(name, works, owners) for name in works}
        ours.to(gpu.DEVICE)
        with torch.inference_mode():
            found = gpu.in_turns(works, rounds=2)
            kernels = gpu.attempted(lambda: gpu.kernels_ms(run_ours))
        return {
            "seconds": found,
            "first_seconds": first_seconds,
            "failures": failures,
            "times_as_fast": _ratio(found["diffusers"], found["rushes"]),
            "peaks_gb": peaks,
            "share_of_peak": peaks["rushes"] / peaks["diffusers"],
            "off_fp32": gpu.attempted(lambda: _rounding(ours)),
            "kernels": kernels,
        }


def _peak_alone(
    name: str, works: dict[str, Callable[[], None]], owners: dict[str, nn.Module]
) -> float:
    """Of a second run, weights included."""
    for network in owners.values():
        network.to(gpu.DEVICE if network is owners[name] else "cpu")
    with gpu.emptied(), torch.inference_mode():
        works[name]()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        works[name]()
        return gpu.peak_gb()


def _rounding(network: vae.WanVAE) -> dict[str, float]:
    """Decoding in bf16 against fp32, two chunks of 512x384 pixels."""
    latents = torch.randn(1, 16, 3, 48, 64, device=gpu.DEVICE)

    def decoded(which: vae.WanVAE) -> Tensor:
        return torch.cat(list(which.decode_chunks(latents)), dim=2)

    with torch.inference_mode():
        compiled = decoded(network)
        with fusion.running_with(fusion.eagerly):
            eager, exact = decoded(network), decoded(copy.deepcopy(network).float())
    found = {"rushes": compiled, "eagerly": eager}
    return {name: measuring.relative(y, exact) for name, y in found.items()}


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(one / two for one, two in zip(slow, fast, strict=True))
