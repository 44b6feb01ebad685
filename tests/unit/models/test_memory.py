"""What a render needs is said before weights are read: sums that add up, near what is counted."""

import dataclasses
import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks import holding
from models import (
    checkpoint,
    config,
    errors,
    layout,
    memory,
    quantized_files,
    safetensors_files,
    torch_files,
    transformer,
    vae,
)
from models.memory import Mode, Offload
from models.quantization import Scheme

VIDEO = {"num_frames": 17, "height": 64, "width": 96}


@pytest.fixture
def files(native_root):
    return layout.find(native_root)


def tensors_bytes(network):
    return sum({id(t): t.nbytes for t in network.state_dict(keep_vars=True).values()}.values())


# Headers


def test_a_torch_file_is_described_without_being_read(native_root):
    path = native_root / "Wan2.1_VAE.pth"
    stored = torch.load(path, weights_only=True)
    header = torch_files.read_header(path)
    assert {name: entry.shape for name, entry in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert all(entry.dtype == "F32" for entry in header.values())


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, *FP8], ids=str
)
@pytest.mark.parametrize("is_older", [False, True], ids=["zip", "older"])
def test_types_of_a_torch_file(tmp_path, dtype, is_older):
    path = tmp_path / "x.pth"
    parameter = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype), requires_grad=False)
    content = {"x": parameter, "y": parameter.data[1:, 2:]}
    torch.save(content, path, _use_new_zipfile_serialization=not is_older)
    header = torch_files.read_header(path)
    assert header["x"].num_bytes == 15 * dtype.itemsize
    assert header["y"].shape == (2, 3)
    assert {entry.dtype for entry in header.values()} == {header["x"].dtype}
    assert header["x"].dtype in torch_files.STORAGE_DTYPES.values() or dtype in FP8


def test_a_torch_file_with_anything_else_is_refused_and_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    path = tmp_path / "x.pth"
    contents = ({"x": Payload()}, {"x": 3}, [torch.zeros(1)])
    for content, is_zip in itertools.product(contents, (True, False)):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(errors.UnreadableWeightsError) as caught:
            torch_files.read_header(path)
        assert caught.value.path == path
    assert not (tmp_path / "executed").exists()


def pickled_as(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", content)


def with_header(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


@pytest.mark.parametrize(
    ("name", "write", "content"),
    [
        ("long.pth", pickled_as, b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little")),
        ("odd.pth", pickled_as, b"\x80\x02]Q."),
        ("deep.safetensors", with_header, b"[" * 200_000),
        ("huge.safetensors", with_header, b'{"a": {"dtype": "F32", "shape": [Infinity]}}'),
        ("negative.safetensors", with_header, b'{"a": {"dtype": "F32", "shape": [-1]}}'),
    ],
)
def test_headers_that_lie_are_named(tmp_path, name, write, content):
    path = tmp_path / name
    write(path, content)
    read = safetensors_files if path.suffix == ".safetensors" else torch_files
    with pytest.raises(errors.UnreadableWeightsError, match=name):
        read.read_header(path)


def test_the_beginning_of_a_file_is_told_as_that(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1_000)}, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(errors.UnreadableWeightsError, match="its end is missing"):
        torch_files.read_header(path)


def test_a_damaged_compressed_file_is_named(tmp_path):
    path = tmp_path / "x.pth"
    pickled_as(path, bytes(9_000), compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(errors.UnreadableWeightsError):
        torch_files.read_header(path)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK")
    with pytest.raises(errors.UnreadableWeightsError):
        torch_files.read_header(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(errors.UnreadableWeightsError):
        torch_files.read_header(path)
    for content in (b"", b"\0" * 8, b"\5" + b"\0" * 7 + b"hello", b"\2" + b"\0" * 7 + b"[]"):
        path.write_bytes(content)
        with pytest.raises(errors.UnreadableWeightsError):
            safetensors_files.read_header(path)


def test_a_safetensors_header_names_types_and_shapes(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(tensors, path, metadata={"who": "me"})
    header = safetensors_files.read_header(path)
    assert header["a"] == safetensors_files.Entry("F32", (2, 3))
    assert header["b"].num_bytes == 4
    assert safetensors_files.read_metadata(path) == {"who": "me"}


# Weights


def load(root, *, vae_dtype=None, **options):
    files = layout.find(root, **options)
    return checkpoint.load(files, device="cpu", dtype=torch.bfloat16, vae_dtype=vae_dtype)


def resident(files, **options):
    stage = memory.needed(files, **VIDEO, **options).stages["denoise"]
    return {name: stage[name] for name in ("transformer", "autoencoder", "text encoder")}


def test_weights_are_counted_as_they_are_loaded(native_root, diffusers_root):
    for root in (native_root, diffusers_root()):
        networks = load(root)
        assert resident(layout.find(root)) == {
            "transformer": tensors_bytes(networks.transformer),
            "autoencoder": tensors_bytes(networks.vae),
            "text encoder": tensors_bytes(networks.text_encoder.network),
        }


def test_quantized_weights_are_counted_as_such(files, native_root, tmp_path):
    target = tmp_path / "small.safetensors"
    quantized_files.write(files, target, Scheme.FP8)
    small = layout.find(native_root, transformer_file=target)
    loaded = load(native_root, transformer_file=target)
    assert resident(small)["transformer"] == tensors_bytes(loaded.transformer)


def test_frames_decoded_in_fp32_take_the_autoencoder_in_fp32(files, native_root):
    wide = load(native_root, vae_dtype=torch.float32).vae
    assert resident(files, vae_bytes=4)["autoencoder"] == tensors_bytes(wide)


def test_what_is_wide_is_what_the_network_keeps_wide():
    with torch.device("meta"):
        names = transformer.WanTransformer(config.TINY).state_dict()
    for name in names:
        is_wide = transformer.parameter_dtype(name, torch.bfloat16) == torch.float32
        assert bool(memory.WIDE_IN_TRANSFORMER.search(name)) == is_wide, name


# Structure


ALL_MODES = [
    Mode(offload=offload, text_encoder_on_cpu=on_cpu, vae_tiles=tiles)
    for offload in Offload
    for on_cpu in (False, True)
    for tiles in (False, True)
]


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
def test_parts_sum_up_and_the_worst_stage_decides(files, mode):
    need = memory.needed(files, **VIDEO, mode=mode)
    assert need.stages.keys() == {"text", "denoise", "decode"}
    assert need.device_bytes == max(sum(parts.values()) for parts in need.stages.values())
    assert sum(need.stages[need.worst_stage].values()) == need.device_bytes
    assert need.host_bytes == sum(need.host.values())
    assert all(count >= 0 for parts in need.stages.values() for count in parts.values())


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
@pytest.mark.parametrize(
    "more", [{"num_frames": 81}, {"height": 480}, {"width": 832}], ids=lambda more: next(iter(more))
)
def test_more_video_never_needs_less(files, mode, more):
    small = memory.needed(files, **VIDEO, mode=mode)
    large = memory.needed(files, **{**VIDEO, **more}, mode=mode)
    assert large.device_bytes >= small.device_bytes
    assert large.stages["denoise"]["activations"] > small.stages["denoise"]["activations"]


def test_each_mode_needs_less_of_the_device_than_the_one_before(files):
    needs = [memory.needed(files, **VIDEO, mode=Mode(offload=offload)) for offload in Offload]
    for stage in ("text", "denoise", "decode"):
        sums = [sum(need.stages[stage].values()) for need in needs]
        assert sums[1] < sums[0]
    denoise = [sum(need.stages["denoise"].values()) for need in needs]
    assert denoise == sorted(denoise, reverse=True)
    assert needs[0].host_bytes == 0 < needs[1].host_bytes


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        (Mode(), set()),
        (Mode(park_encoders=True), {"text encoder", "autoencoder"}),
        (Mode(offload=Offload.MODEL), {"text encoder", "autoencoder", "transformer"}),
        (Mode(offload=Offload.BLOCK), {"text encoder", "autoencoder", "transformer blocks"}),
    ],
)
def test_what_waits_on_the_host_waits_there_once(files, mode, parts):
    assert memory.needed(files, **VIDEO, mode=mode).host.keys() == parts


def test_options_take_from_the_device_what_they_say(files):
    plain = memory.needed(files, **VIDEO)
    on_cpu = memory.needed(files, **VIDEO, mode=Mode(text_encoder_on_cpu=True))
    assert "text encoder" not in on_cpu.stages["text"]
    assert on_cpu.host["text encoder"] == plain.stages["text"]["text encoder"]
    big = {**VIDEO, "height": 480, "width": 832}
    tiles = memory.needed(files, **big, mode=Mode(vae_tiles=True)).stages["decode"]
    whole = memory.needed(files, **big).stages["decode"]
    ratio = whole["activations"] / tiles["activations"]
    assert ratio == pytest.approx(480 * 832 / 256**2)


def test_a_first_frame_is_encoded_also_where_there_is_no_image_encoder(files):
    """As in Wan2.2."""
    assert not files.image_encoder
    for mode in (Mode(), Mode(offload=Offload.BLOCK)):
        of_text, of_image = (
            memory.needed(dataclasses.replace(files, task=task), **VIDEO, mode=mode).stages
            for task in layout.Task
        )
        assert of_image.keys() - of_text.keys() == {"image"}
        assert of_image["image"]["activations"] > of_image["decode"]["activations"]
    big = {**VIDEO, "height": 480, "width": 832}
    i2v = dataclasses.replace(files, task=layout.Task.IMAGE_TO_VIDEO)
    whole, tiled = (
        memory.needed(i2v, **big, mode=Mode(vae_tiles=tiles)).stages for tiles in (False, True)
    )
    assert tiled["image"] == whole["image"]  # it is not encoded in tiles


def test_two_transformers_wait_together_and_come_one_at_a_time(files):
    """As `resident.Denoiser` has it: the second comes when the first has gone."""
    pair = dataclasses.replace(files, low_noise_transformer=files.transformer)
    for offload, on_device, on_host in ((Offload.NONE, 2, 0), (Offload.MODEL, 1, 2)):
        one = resident(files)["transformer"]
        need = memory.needed(pair, **VIDEO, mode=Mode(offload=offload))
        assert need.stages["denoise"]["transformer"] == on_device * one
        waits = need.host.get("transformer", 0)
        assert on_host * one <= waits <= 2 * on_host * one  # rounded up by torch


def test_of_two_transformers_the_larger_one_decides_and_both_wait(files, native_root, tmp_path):
    target = tmp_path / "small.safetensors"
    quantized_files.write(files, target, Scheme.FP8)
    large, small = files.transformer, layout.find(native_root, transformer_file=target).transformer
    blocks = {
        paths: memory.needed(
            dataclasses.replace(files, transformer=paths), **VIDEO, mode=Mode(offload=Offload.BLOCK)
        ).host["transformer blocks"]
        for paths in (large, small)
    }
    for high, low in ((large, small), (small, large)):
        pair = dataclasses.replace(files, transformer=high, low_noise_transformer=low)
        need = memory.needed(pair, **VIDEO, mode=Mode(offload=Offload.MODEL))
        assert need.stages["denoise"]["transformer"] == resident(files)["transformer"]
        need = memory.needed(pair, **VIDEO, mode=Mode(offload=Offload.BLOCK))
        assert need.host["transformer blocks"] == sum(blocks.values())


def test_a_pair_is_read_again_where_both_can_be(files):
    for high, low in (("a.pt", "b.safetensors"), ("a.safetensors", "b.pt")):
        pair = {"transformer": (Path(high),), "low_noise_transformer": (Path(low),)}
        assert not dataclasses.replace(files, **pair).transformers_can_be_read_again
    pair["low_noise_transformer"] = pair["transformer"]
    assert dataclasses.replace(files, **pair).transformers_can_be_read_again


def test_loras_stay_beside_8_bit_weights_alone(files, tmp_path):
    plain = memory.needed(files, **VIDEO, lora_bytes=1000)
    assert "LoRAs" not in plain.stages["denoise"]
    target = tmp_path / "fp8.safetensors"
    quantized_files.write(files, target, Scheme.FP8)
    eight = dataclasses.replace(files, transformer=(target,))
    for offload in Offload:
        mode = Mode(offload=offload)
        without = memory.needed(eight, **VIDEO, mode=mode)
        need = memory.needed(eight, **VIDEO, mode=mode, lora_bytes=1000)
        assert need.device_bytes == without.device_bytes + 1000
        assert need.resident_bytes == without.resident_bytes + 1000


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("wide", [1, 2])
def test_pinned_memory_of_a_large_network_is_little_more_than_its_weights(wide, by_block):
    """torch rounds an allocation up to a power of two; of each block alone, by a half."""
    with torch.device("meta"):
        network = transformer.WanTransformer(config.WAN_T2V_14B)
    sizes = [wide * parameter.numel() for parameter in network.parameters()]
    if by_block:
        sizes = [wide * sum(p.numel() for p in block.parameters()) for block in network.blocks]
    shared = memory.stretches(sizes)
    assert sorted(place for places in shared for place in places) == list(range(len(sizes)))
    pinned = memory.pinned_bytes([sizes[place] for place in places] for places in shared)
    assert sum(sizes) <= pinned < 1.06 * sum(sizes)


def test_only_weights_that_cannot_be_read_again_are_copied_for_a_lora(files, tmp_path):
    assert memory.needed(files, **VIDEO, switches_loras=True).host == {}
    pickled = tmp_path / "distill_model.pt"
    torch.save(safetensors.torch.load_file(files.transformer[0]), pickled)
    files = dataclasses.replace(files, transformer=(pickled,))
    needed = memory.needed(files, **VIDEO, switches_loras=True)
    (name, count), whole = *needed.host.items(), needed.stages["text"]["transformer"]
    assert name == "weights without LoRA"
    assert whole <= count < 2 * whole  # rounded up by torch
    assert memory.needed(files, **VIDEO).host == {}


def test_no_torch_is_loaded_to_say_it(native_root):
    code = (
        "import sys, pathlib; from models import layout, memory;"
        f"files = layout.find(pathlib.Path({str(native_root)!r}));"
        "assert memory.needed(files, num_frames=5, height=32, width=32).device_bytes;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Activations, counted on `meta`


def peak(network, run, *inputs):
    return holding.peak(lambda: run(*inputs), given=[*network.parameters(), *inputs])


@pytest.mark.parametrize("sizes", [config.WAN_T2V_1_3B, config.WAN_T2V_14B], ids=["1.3B", "14B"])
def test_denoising_holds_what_is_estimated(sizes):
    with torch.device("meta"):
        network = transformer.WanTransformer(dataclasses.replace(sizes, num_layers=2))
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
        inputs = torch.randn(1, 16, 21, 60, 104), torch.ones(1), torch.randn(1, 512, 4096)
        counted = peak(network, network, *inputs)
    estimated = memory._denoise_activations(sizes, config.WAN_VAE, 81, 480, 832)
    print(f"counted {counted / 2**30:.2f} GiB, estimated {estimated / 2**30:.2f}")  # noqa: T201
    assert counted <= estimated < 1.05 * counted


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_the_autoencoder_holds_what_is_estimated(part):
    with torch.device("meta"):
        network = vae.WanVAE(config.WAN_VAE)
        vae.to_channels_last(network)
        if part == "decode":
            run, x = (
                lambda z: [None for _ in network.decode_chunks(z)],
                torch.randn(1, 16, 3, 60, 104),
            )
        else:
            run, x = network.encode, torch.randn(1, 3, 9, 480, 832)
        counted = peak(network, run, x)
    per_pixel = getattr(memory, f"{part.upper()}_ELEMENTS_PER_PIXEL")
    estimated = memory._vae_activations(per_pixel, config.WAN_VAE, 480, 832, Mode(), 4)
    print(f"counted {counted / 2**30:.2f} GiB, estimated {estimated / 2**30:.2f}")  # noqa: T201
    assert counted <= estimated < 1.05 * counted
