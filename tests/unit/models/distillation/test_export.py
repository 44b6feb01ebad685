"""What is exported is what the renderer renders."""

import pytest
import safetensors
import torch

from models import errors, lora, lora_switcher, sampling
from models.distillation import export

LEVELS = sampling.noise_levels((1000, 750, 500, 250), 5.0)


def rendered(velocity_fn, seed=3):
    noise, _ = sampling.initial_noise(seed, (16, 2, 4, 4), "cpu")
    with torch.no_grad():
        return sampling.denoise(velocity_fn, noise, LEVELS, step_rule="euler")


def by_training(train, context):
    return rendered(train.nets.student.at(context, None))


def by_renderer(network, context):
    return rendered(lambda x, t: network(x, t, context))


def trained(train, *modes, **changes):
    done = train(*modes, **changes)
    for _ in range(2):
        done.step()
    return done


def test_a_complete_student_renders_as_it_was_trained(train, teacher, tmp_path):
    """All tensors, in bf16, under native names; four steps of the renderer's loop."""
    done, context = trained(train, ema=None), torch.randn(1, 6, 16)
    path = export.write(done, tmp_path)
    assert path == tmp_path / "distill_models" / "distill_model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    network = teacher()
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert not torch.equal(by_renderer(network, context), by_renderer(teacher(), context))
    difference = by_renderer(network, context) - by_training(done, context)
    assert difference.abs().max() < 0.1  # of values near 1; the file is in bf16
    with torch.no_grad():
        for name, weight in done.student.trained.items():
            weight.copy_(tensors[name])
    torch.testing.assert_close(by_renderer(network, context), by_training(done, context))


def test_a_lora_renders_as_it_was_trained(train, teacher, tmp_path):
    """In LightX2V's keys without alpha, so that both loaders take its scale for 1."""
    done, context = trained(train, "lora", ema=None), torch.randn(1, 6, 16)
    path = export.write(done, tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        keys = set(file.keys())
    layers = [name.removesuffix(".up") for name in done.student.trained if name.endswith(".up")]
    assert keys == {
        f"diffusion_model.{layer}.lora_{part}.weight" for layer in layers for part in ("up", "down")
    }
    assert len(layers) == 2 * 10
    network = teacher()
    lora_switcher.LoraSwitcher(network).apply([lora_switcher.Choice(path=path)])
    base = by_renderer(teacher(), context)
    merged = by_renderer(network, context)
    assert (merged - by_training(done, context)).abs().max() < 0.02 * (merged - base).abs().max()


def test_merged_weights_compute_as_the_lora_beside_them(train, teacher):
    """Within 1e-5 in fp32."""
    done, context = trained(train, "lora"), torch.randn(1, 6, 16)
    merged, tuning = teacher(), done.how.student
    with torch.no_grad():
        for name, up in done.student.trained.items():
            if name.endswith(".up"):
                layer = name.removesuffix(".up")
                delta = tuning.scale * up @ done.student.trained[f"{layer}.down"]
                merged.get_parameter(f"{layer}.weight").add_(delta)
    noise, sigma = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.9])
    beside = done.nets.student.velocity(noise, sigma, context, None)
    torch.testing.assert_close(merged(noise, 1000 * sigma, context), beside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("averaged", [True, False])
def test_the_average_is_exported_unless_the_student_itself_is_asked_for(train, tmp_path, averaged):
    done = trained(train, ema=0.5)
    path = export.write(done, tmp_path, averaged=averaged)
    name = "blocks.0.self_attn.q.weight"
    with safetensors.safe_open(path, "pt") as file:
        written = file.get_tensor(name)
        metadata = file.metadata()
    source = done.average.tensors if averaged else done.student.trained
    assert torch.equal(written, source[name].detach().bfloat16())
    assert metadata["averaged"] == str(averaged).lower()


def test_a_file_tells_how_to_render_it_and_both_readings_of_its_guidance(train, tmp_path):
    path = export.write(train(guidance=6.0, rollout="renoise"), tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["step_rule"] == "renoise"
    assert told["denoising_step_list"] == "[1000, 750, 500, 250]"
    assert told["guidance"] == "6"
    assert told["guidance_form"] == "uncond + guidance * (cond - uncond)"
    assert told["guidance_as_cond_plus_g"] == "5"


def test_a_preset_renders_by_the_step_rule_that_was_trained(how, tmp_path):
    asked = export.preset({}, how(rollout="renoise"), path=tmp_path, is_lora=False)
    assert asked["step_rule"] == "renoise"


def test_what_the_renderer_would_refuse_is_not_called_exported(train, tmp_path):
    broken = train("lora", ema=None)
    next(iter(broken.student.trained.values())).data.fill_(float("nan"))
    with pytest.raises(errors.LoraMismatchError, match="NaN"):
        export.write(broken, tmp_path)
    assert list((tmp_path / "loras").iterdir()) == []


def test_a_complete_student_that_is_not_finite_is_not_called_exported(train, tmp_path):
    broken = train(ema=None)
    next(iter(broken.student.trained.values())).data.fill_(float("nan"))
    with pytest.raises(errors.UnreadableWeightsError, match="holds NaN or infinity"):
        export.write(broken, tmp_path)
    assert list((tmp_path / "distill_models").iterdir()) == []


def test_every_layer_of_the_lora_is_read_back(train, tmp_path):
    done = train("lora")
    path = export.write(done, tmp_path)
    shapes = export.native_shapes(done.nets.student.network)
    read = lora.read(path, shapes)
    assert len(read.pairs) == len(done.student.trained) / 2
    assert not read.deltas
