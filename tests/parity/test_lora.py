"""Merged weights are those of diffusers' own loader with PEFT, where it reads the form.

It drops differences of norms and of modulation (`norm_q.diff`, `norm3.diff`, `diff_m`) and of the
patch embedding, which a LightX2V file has; those are compared with their definition in the unit
tests and kept out of the files here.
"""

import pytest
import safetensors.torch
import torch

from models import lora_switcher, weight_names

pytest.importorskip("peft", reason="diffusers' LoRA loader needs it")

# PEFT warns of what does not concern a single merge.
pytestmark = [pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")]

RANK = 4
STRENGTH = 0.7
BLOCK_MATRICES = [
    f"{part}.{leaf}"
    for part, leaves in (("self_attn", "qkvo"), ("cross_attn", "qkvo"), ("ffn", "02"))
    for leaf in leaves
]


def diffusers_name(module):
    return weight_names.rename(f"{module}.", weight_names.TRANSFORMER)[:-1]


def native(module):
    return f"diffusion_model.{module}"


def diffusers(module):
    return f"transformer.{diffusers_name(module)}"


def kohya(module):
    return "lora_unet_" + module.replace(".", "_")


UP_DOWN = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")


@pytest.fixture
def block_matrices():
    return [f"blocks.{i}.{leaf}" for i in range(3) for leaf in BLOCK_MATRICES]


@pytest.fixture
def save(tmp_path):
    def write(tensors):
        path = tmp_path / "style.safetensors"
        safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path)
        return path

    return write


def pairs(network, modules, draw, spelling, halves, *, alpha=None):
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    tensors = {}
    for module in modules:
        out_features, in_features = shapes[f"{module}.weight"]
        tensors[f"{spelling(module)}.{halves[0]}"] = draw(RANK, in_features)
        tensors[f"{spelling(module)}.{halves[1]}"] = draw(out_features, RANK)
        if alpha is not None:
            tensors[f"{spelling(module)}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return tensors


def merged_by_diffusers(reference, path):
    """The reference with the LoRA fused into its weights, under diffusers' names."""
    from diffusers.loaders import WanLoraLoaderMixin

    state_dict, metadata = WanLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    state_dict = WanLoraLoaderMixin._maybe_expand_t2v_lora_for_i2v(reference, state_dict)
    reference.load_lora_adapter(state_dict, metadata=metadata, adapter_name="style")
    reference.set_adapters(["style"], [STRENGTH])
    reference.fuse_lora(adapter_names=["style"])
    reference.unload_lora()
    return reference.state_dict()


@pytest.fixture
def compare(transformer_pair, record_property):
    def check(make_tensors, save):
        reference, ours = transformer_pair(torch.float64)
        before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        path = save(make_tensors(ours))
        lora_switcher.LoraSwitcher(ours).apply([lora_switcher.Choice(path=path, strength=STRENGTH)])
        after = ours.state_dict()
        names = weight_names.transformer_from_diffusers(after)
        theirs = merged_by_diffusers(reference, path)
        changed, worst = 0, 0.0
        for name, tensor in theirs.items():
            mine = after[names[name]]
            worst = max(worst, ((mine - tensor).norm() / tensor.norm()).item())
            changed += not torch.equal(mine, before[names[name]])
        record_property("relative_error", worst)
        print(f"relative error {worst:.2e}")  # noqa: T201  # `pytest -rP` lists the numbers
        assert worst < 1e-14
        return changed

    return check


@pytest.mark.parametrize("halves", [UP_DOWN, A_B], ids=["up, down", "B, A"])
@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_native_names(compare, save, draw, block_matrices, halves, alpha):
    changed = compare(
        lambda network: pairs(network, block_matrices, draw, native, halves, alpha=alpha), save
    )
    assert changed == len(block_matrices)


def test_diffusers_names(compare, save, draw, block_matrices):
    modules = [*block_matrices, "time_projection.1", "text_embedding.0", "head.head"]
    changed = compare(lambda network: pairs(network, modules, draw, diffusers, A_B), save)
    assert changed == len(modules)


def test_kohya_names(compare, save, draw, block_matrices):
    changed = compare(
        lambda network: pairs(network, block_matrices, draw, kohya, UP_DOWN, alpha=2.0), save
    )
    assert changed == len(block_matrices)


def test_lightx2v_pairs_biases_and_head(compare, save, draw, block_matrices):
    """`diff_b` of linear layers and `head.head.diff`, which diffusers turns into pairs."""

    def tensors(network):
        wide = ["time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2"]
        modules = [*block_matrices, *wide, "time_projection.1"]
        found = pairs(network, modules, draw, native, UP_DOWN)
        for module in (*modules, "head.head"):
            found[f"{native(module)}.diff_b"] = draw(*network.get_submodule(module).bias.shape)
        found[f"{native('head.head')}.diff"] = draw(*network.head.head.weight.shape)
        return found

    assert compare(tensors, save) == 2 * (len(block_matrices) + 5 + 1)
