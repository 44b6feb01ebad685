"""Where 8-bit copies go, and the pairs of Wan2.2; what is in a file see `test_quantization`."""

import shutil

import pytest
import safetensors.torch
import torch

from jobs import preset_values
from models import checkpoint, errors, layout, quantized_files, safetensors_files
from models.quantization import Scheme

DIT = "diffusion_pytorch_model.safetensors"
PUBLISHED = "wan2.1_t2v_14b_lightx2v_4step.safetensors"
EXPERTS = ("high_noise_model", "low_noise_model")


def looked_for_by_a_preset(root, scheme, **more):
    """The transformers of a preset that asks for 8-bit weights and names no file."""
    fields = {"dit_quantized": True, "dit_quant_scheme": f"{scheme.value}-sgl", **more}
    look = preset_values.read(fields | {"model_path": str(root)}, name="preset").look
    return look.high_noise_transformer or look.transformer, look.low_noise_transformer


def distilled(root, name):
    (root / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(root / DIT, root / name)
    return root


@pytest.mark.parametrize("name", ["distill_models/distill_model.safetensors", PUBLISHED])
@pytest.mark.parametrize("scheme", Scheme)
def test_a_distilled_model_goes_where_presets_look(native_root, name, scheme):
    files = layout.find(distilled(native_root, name))
    target = quantized_files.target_for(files, scheme)
    assert str(target.parent) == looked_for_by_a_preset(native_root, scheme)[0]


def test_a_base_model_goes_where_presets_with_a_lora_look(native_root):
    target = quantized_files.target_for(layout.find(native_root), Scheme.FP8)
    assert str(target.parent) == looked_for_by_a_preset(native_root, Scheme.FP8, lora_path="a")[0]


def test_a_copy_says_what_the_original_was_distilled_for(native_root, tmp_path):
    source, said = native_root / DIT, {"denoising_step_list": "[1000, 500]"}
    tensors = safetensors.torch.load_file(source)
    safetensors.torch.save_file(tensors, source, said)
    quantized_files.write(layout.find(native_root), tmp_path / "new.safetensors", Scheme.FP8)
    found = safetensors_files.read_metadata(tmp_path / "new.safetensors")
    assert found == said | {"format": "pt"}


def test_a_name_that_no_preset_could_render_with_is_refused(native_root, tmp_path):
    with pytest.raises(ValueError, match=r"are a \.safetensors file"):
        quantized_files.write(layout.find(native_root), tmp_path / "new/weights", Scheme.FP8)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("is_distilled", [True, False])
def test_both_experts_are_written_where_presets_look_and_load(experts_root, is_distilled):
    if is_distilled:
        (experts_root / "distill_models").mkdir()
        for name in EXPERTS:
            shutil.copytree(experts_root / name, experts_root / "distill_models" / name)
    files = layout.find(experts_root)
    target = quantized_files.target_for(files, Scheme.INT8)
    report = quantized_files.write(files, target, Scheme.INT8)
    loras = {} if is_distilled else {"lora_configs": [{"path": "a", "name": EXPERTS[0]}]}
    found = looked_for_by_a_preset(experts_root, Scheme.INT8, boundary_step_index=2, **loras)
    assert found == tuple(str(target / name) for name in EXPERTS)
    assert {name.partition(".")[0] for name in report.relative_errors} == set(EXPERTS)
    assert report.num_bytes == sum(path.stat().st_size for path in target.rglob("*.safetensors"))
    written = layout.find(
        experts_root, transformer_file=target / EXPERTS[0], low_noise_file=target / EXPERTS[1]
    )
    networks = checkpoint.load(written, device="cpu", dtype=torch.float32)
    for name, network in zip(
        EXPERTS, (networks.transformer, networks.low_noise_transformer), strict=True
    ):
        layer = network.blocks[0].self_attn.q
        original = safetensors.torch.load_file(experts_root / name / DIT)
        restored = layer.weight.float() * layer.weight_scale
        assert torch.allclose(restored, original["blocks.0.self_attn.q.weight"], atol=0.01)


def test_of_a_pair_nothing_is_left_where_the_second_cannot_be_read(experts_root, edit_tensors):
    name = "blocks.0.self_attn.q.weight"
    edit_tensors(experts_root / EXPERTS[1] / DIT, lambda content: content[name].fill_(torch.nan))
    before = sorted(experts_root.rglob("*"))
    with pytest.raises(errors.UnreadableWeightsError, match=r"low_noise_model.*not finite"):
        quantized_files.write(layout.find(experts_root), experts_root / "fp8", Scheme.FP8)
    assert sorted(experts_root.rglob("*")) == before


def test_an_expert_that_is_there_is_not_overwritten(experts_root):
    there = experts_root / "fp8" / EXPERTS[1] / DIT
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(FileExistsError):
        quantized_files.write(layout.find(experts_root), experts_root / "fp8", Scheme.FP8)
    assert [path for path in (experts_root / "fp8").rglob("*") if path.is_file()] == [there]
    assert there.read_text() == "mine"


def test_a_pair_may_come_from_a_diffusers_folder(diffusers_root, tmp_path):
    root = diffusers_root()
    shutil.copytree(root / "transformer", root / "transformer_2")
    quantized_files.write(layout.find(root), tmp_path / "fp8", Scheme.FP8)
    for name in EXPERTS:
        header = safetensors_files.read_header(tmp_path / "fp8" / name / DIT)
        assert header["blocks.0.self_attn.q.weight"].dtype == "F8_E4M3"
