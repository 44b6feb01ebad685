"""What a GPU does with our networks: `python -m benchmarks.gpu [--out FILE] [--only PART ...]`.

Weights are random and made on the device. Each time is told with its floor: the operations at the
rate that a large bf16 product reached here, or the bytes at the rate that a copy reached. A line of
JSON per part is written to FILE as soon as it is known; a part that fails says so, and the next one
begins. All of it fits ten minutes on one H100.
"""

import argparse
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_attention, gpu_fp8, gpu_peers, measuring, networks
from benchmarks.gpu_common import (
    BF16,
    DEVICE,
    compiled_chains,
    emptied,
    inputs,
    peak_gb,
    random_transformer,
)
from models import attention, config, fusion, offload, sampling, vae
from worker import pipeline


def ceilings(_report: measuring.Report) -> dict[str, Any]:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    matmul = measuring.seconds(lambda: a @ b)["least"]
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    copy = measuring.seconds(source.clone)["least"]
    pinned = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    pageable = torch.empty(2**30, dtype=torch.uint8)
    target = source[: 2**30]
    return {
        "matmul_tflops": 2 * 8192**3 / matmul / 1e12,
        "copy_gb_per_s": 2 * 2**32 / copy / 1e9,
        "pinned_gb_per_s": 2**30 / measuring.seconds(lambda: target.copy_(pinned))["least"] / 1e9,
        "pageable_gb_per_s": 2**30
        / measuring.seconds(lambda: target.copy_(pageable))["least"]
        / 1e9,
    }


def dit(
    report: measuring.Report,
    sizes: config.TransformerConfig,
    repeats: int,
    latents: tuple[int, ...] = networks.LATENTS["480p"],
) -> dict[str, Any]:
    with emptied(), torch.inference_mode():
        network = random_transformer(sizes)
        arguments = inputs(latents)
        fusion.run_with(fusion.eagerly)
        eager_y = network(*arguments)
        eager = measuring.seconds(lambda: network(*arguments), repeats=repeats)
        eager_peak = peak_gb()
        with compiled_chains() as failures:
            began = time.perf_counter()
            compiled_y = network(*arguments)
            torch.cuda.synchronize()
            compiling = time.perf_counter() - began
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            compiled = measuring.seconds(lambda: network(*arguments), repeats=repeats)
            compiled_peak = peak_gb()
        count = networks.flops(sizes, latents)
        floor = count / (report.facts["ceilings"]["matmul_tflops"] * 1e12)
        return {
            "pflop": count / 1e15,
            "floor_seconds": floor,
            "eager": eager,
            "compiled": compiled,
            "compile_seconds": compiling,
            "failures": failures,
            "compiled_to_eager": measuring.relative(compiled_y, eager_y),
            "share_of_floor": floor / min(eager["seconds"], compiled["seconds"]),
            "kernels": attention.names(),
            "eager_peak_gb": eager_peak,
            "compiled_peak_gb": compiled_peak,
        }


def dit_1_3b(report: measuring.Report) -> dict[str, Any]:
    return dit(report, config.WAN_T2V_1_3B, measuring.REPEATS)


def dit_14b(report: measuring.Report) -> dict[str, Any]:
    return dit(report, config.WAN_T2V_14B, 3)


def dit_14b_720p(report: measuring.Report) -> dict[str, Any]:
    return dit(report, config.WAN_T2V_14B, 1, networks.LATENTS["720p"])


def blocks(_report: measuring.Report) -> dict[str, Any]:
    """1.3B with its blocks streamed from pinned memory: the same numbers, less memory."""
    with emptied(), torch.inference_mode():
        fusion.run_with(fusion.eagerly)
        network = random_transformer(config.WAN_T2V_1_3B)
        arguments = inputs()
        resident_y = network(*arguments)
        torch.cuda.reset_peak_memory_stats()
        resident = measuring.seconds(lambda: network(*arguments), repeats=3)
        resident_peak = peak_gb()
        offload.BlockStreamer(network.cpu(), DEVICE)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        streamed_y = network(*arguments)
        streamed = measuring.seconds(lambda: network(*arguments), repeats=3)
        return {
            "equal": torch.equal(streamed_y, resident_y),
            "resident": resident,
            "streamed": streamed,
            "resident_peak_gb": resident_peak,
            "streamed_peak_gb": peak_gb(),
        }


def whole_14b(_report: measuring.Report) -> dict[str, Any]:
    """Prompt to frames on the host, 480p: text, four steps, decoding; without mp4 and upload."""
    with emptied():
        encoder = networks.filled(networks.text_encoder())
        decoder = networks.filled(networks.autoencoder())
        vae.to_channels_last(decoder)
        network = random_transformer(config.WAN_T2V_14B)
        levels = sampling.noise_levels((1000, 750, 500, 250), 5.0)
        ids = torch.randint(3, 250_000, (1, 512), device=DEVICE)
        stages: dict[str, list[float]] = {"text": [], "denoise": [], "decode": []}

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            torch.cuda.synchronize()
            began = time.perf_counter()
            yield
            torch.cuda.synchronize()
            stages[name].append(time.perf_counter() - began)

        with torch.inference_mode(), compiled_chains() as failures:
            for seed in range(4):
                with stage("text"):
                    context = encoder(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
                noise, _ = sampling.initial_noise(seed, networks.LATENTS["480p"], DEVICE)
                with stage("denoise"):
                    latents = sampling.denoise(
                        lambda x, t, context=context: network(x, t, context),
                        noise,
                        levels,
                        step_rule="euler",
                    )
                with stage("decode"):
                    under_way = [
                        pipeline.FramesUnderWay(chunk) for chunk in decoder.decode_chunks(latents)
                    ]
                    for frames in under_way:
                        frames.arrived()
        warm = {name: statistics.median(times[1:]) for name, times in stages.items()}
        return {
            "first": {name: times[0] for name, times in stages.items()},
            **warm,
            "seconds": sum(warm.values()),
            "videos_per_hour": 3600 / sum(warm.values()),
            "peak_gb": peak_gb(),
            "failures": failures,
        }


def text(_report: measuring.Report) -> dict[str, Any]:
    """One prompt of 512 tokens through UMT5-XXL."""
    with emptied(), torch.inference_mode():
        network = networks.filled(networks.text_encoder())
        ids = torch.randint(3, 250_000, (1, 512), device=DEVICE)
        mask = torch.ones_like(ids)
        return {
            **measuring.seconds(lambda: network(input_ids=ids, attention_mask=mask)),
            "peak_gb": peak_gb(),
        }


def out_of_memory(_report: measuring.Report) -> dict[str, Any]:
    """A real one in the worker's own path; then the same latents in each smaller mode."""
    from jobs import looks, presets
    from models.tiny import shipped
    from worker import components, device, errors, pipeline, settings, stopwatch

    here = device.current(settings.WorkerSettings())
    look = presets.load("tiny").look.with_changes({"width": 320, "height": 320, "num_frames": 81})
    spec = looks.RenderSpec(
        look=look, prompt="a red circle moves right", negative_prompt=None, seed=1, image_key=None
    )
    with tempfile.TemporaryDirectory() as home, emptied():
        warm = components.Components(models_dir=shipped.FOLDER, home=Path(home), device=here)

        def render() -> Tensor:
            with here.faults():
                return pipeline.make_latents(
                    spec,
                    warm.model_for(look),
                    device=here,
                    timings=stopwatch.Timings(here.synchronize),
                    reached=lambda *_: None,
                )

        resident = render()
        modes, told = [str(warm.mode_of(look))], []
        torch.cuda.empty_cache()
        room = torch.cuda.memory_allocated() + 2**22
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
        try:
            render()
        except errors.DeviceOutOfMemory as error:
            told.append(str(error)[:200])
        torch.cuda.set_per_process_memory_fraction(1.0)
        while (mode := warm.step_down(look)) is not None:
            modes.append(str(mode))
            told.append(f"equal to the first: {torch.equal(render(), resident)}")
        return {"told": told, "modes": modes}


PARTS: dict[str, Callable[[measuring.Report], dict[str, Any]]] = {
    "machine": lambda _report: measuring.machine(),
    "ceilings": ceilings,
    "sustained": gpu_attention.sustained,
    "attention": gpu_attention.kernels,
    "autoencoder_against_diffusers": gpu_peers.autoencoders,
    "against_diffusers": gpu_peers.transformers,
    "fp8": gpu_fp8.products,
    "fp8_14b": gpu_fp8.forward_14b,
    "blocks": blocks,
    "dit_14b": dit_14b,
    "whole_14b": whole_14b,
    "text": text,
    "dit_1_3b": dit_1_3b,
    "out_of_memory": out_of_memory,
    "dit_14b_720p": dit_14b_720p,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "inductor"))
    report = measuring.Report(options.out)
    measuring.run_parts(
        report,
        {name: functools.partial(part, report) for name, part in PARTS.items()},
        only=None if options.only is None else {"machine", "ceilings", *options.only},
    )


if __name__ == "__main__":
    main()
