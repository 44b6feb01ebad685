"""Merged weights are those of diffusers' own loader with PEFT, where it reads the form.

It drops differences of norms and of modulation (`norm_q.diff`, `norm3.diff`, `diff_m`) and of the
patch embedding, which a LightX2V file has; those are compared with a sum written here. Spellings
that neither reads are compared with these in the unit tests, bit for bit.
"""

import json
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import nn

from models import config, lora_switcher, weight_names

peft = pytest.importorskip("peft", reason="diffusers' LoRA loader needs it")

# PEFT warns of what does not concern a single merge.
pytestmark = [pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")]

RANK = 4
PIPELINES = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}
SIZES = {
    task: config.TransformerConfig(
        dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_dim=in_dim, text_dim=40, image_dim=image
    )
    for task, in_dim, image in (("t2v", 16, None), ("i2v", 36, 32))
}
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
OLD = ("lora.down.weight", "lora.up.weight")


@pytest.fixture(params=PIPELINES)
def task(request):
    return request.param


class Use(NamedTuple):
    tensors: dict[str, torch.Tensor]
    strength: float = 0.7


def block_matrices(task):
    image = ["cross_attn.k_img", "cross_attn.v_img"] if task == "i2v" else []
    return [f"blocks.{i}.{leaf}" for i in range(2) for leaf in (*BLOCK_MATRICES, *image)]


def outer_matrices(task):
    """Outside the blocks, but for the head."""
    image = ["img_emb.proj.1", "img_emb.proj.3"] if task == "i2v" else []
    wide = [f"{part}_embedding.{layer}" for part in ("text", "time") for layer in (0, 2)]
    return [*wide, "time_projection.1", *image]


def save(tensors, path, metadata=None):
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path


def pairs(network, modules, draw, spelling, halves, *, alpha=None, rank=RANK):
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    tensors = {}
    for module in modules:
        out_features, in_features = shapes[f"{module}.weight"]
        tensors[f"{spelling(module)}.{halves[0]}"] = draw(rank, in_features)
        tensors[f"{spelling(module)}.{halves[1]}"] = draw(out_features, rank)
        if alpha is not None:
            tensors[f"{spelling(module)}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return tensors


def fused_by_diffusers(task, reference, paths, strengths):
    """The reference with the LoRAs fused into its weights, by the pipeline's own methods."""
    pipeline = PIPELINES[task](
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=reference
    )
    names = [path.stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(names, strengths)
    pipeline.fuse_lora(components=["transformer"], adapter_names=names)
    pipeline.unload_lora_weights()
    return reference.state_dict()


def merged(network, paths, strengths):
    lora_switcher.LoraSwitcher(network).apply([
        lora_switcher.Choice(path=path, strength=strength)
        for path, strength in zip(paths, strengths, strict=True)
    ])  # fmt: skip
    return network.state_dict()


@pytest.fixture
def same_weights(record_property):
    """All of ours are those of the reference; how many changed."""

    def check(before, after, theirs):
        names = weight_names.transformer_from_diffusers(after)
        worst = max(
            ((after[names[name]] - tensor).norm() / tensor.norm()).item()
            for name, tensor in theirs.items()
        )
        record_property("relative_error", worst)
        print(f"relative error {worst:.2e}")  # noqa: T201  # `pytest -rP` lists the numbers
        assert worst < 1e-14
        return sum(not torch.equal(before[name], after[name]) for name in before)

    return check


@pytest.fixture
def compare(transformer_pair, same_weights, tmp_path):
    def check(task, make_uses, *, metadata=None):
        reference, network = transformer_pair(torch.float64, sizes=SIZES[task])
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        uses = make_uses(network)
        paths = [
            save(use.tensors, tmp_path / f"lora{number}.safetensors", metadata)
            for number, use in enumerate(uses)
        ]
        strengths = [use.strength for use in uses]
        after = merged(network, paths, strengths)
        return same_weights(before, after, fused_by_diffusers(task, reference, paths, strengths))

    return check


@pytest.mark.parametrize("halves", [UP_DOWN, A_B], ids=["up, down", "B, A"])
@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_native_names(compare, draw, task, halves, alpha):
    modules = block_matrices(task)
    found = compare(task, lambda n: [Use(pairs(n, modules, draw, native, halves, alpha=alpha))])
    assert found == len(modules)


@pytest.mark.parametrize("halves", [A_B, OLD], ids=["B, A", "lora.up, lora.down"])
def test_diffusers_names(compare, draw, task, halves):
    modules = [*block_matrices(task), *outer_matrices(task), "head.head"]
    assert compare(task, lambda n: [Use(pairs(n, modules, draw, diffusers, halves))]) == len(
        modules
    )


def test_settings_that_diffusers_leaves_in_the_header(compare, draw, task):
    modules = block_matrices(task)
    names = [diffusers_name(module) for module in modules]
    settings = {"r": RANK, "lora_alpha": 6, "target_modules": names}
    header = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    metadata = {"format": "pt", "lora_adapter_metadata": header}

    def scaled(network):
        return [Use(pairs(network, modules, draw, diffusers, A_B))]

    assert compare(task, scaled, metadata=metadata) == len(modules)


@pytest.mark.parametrize("alpha", [2.0, 16.0])
def test_kohya_and_musubi_names(compare, draw, task, alpha):
    modules = block_matrices(task)
    found = compare(task, lambda n: [Use(pairs(n, modules, draw, kohya, UP_DOWN, alpha=alpha))])
    assert found == len(modules)


def test_lightx2v_pairs_biases_and_head(compare, draw, task):
    """`diff_b` of linear layers and `head.head.diff`, which diffusers turns into pairs."""
    modules = [*block_matrices(task), *outer_matrices(task)]

    def tensors(network):
        found = pairs(network, modules, draw, native, UP_DOWN)
        for module in (*modules, "head.head"):
            found[f"{native(module)}.diff_b"] = draw(*network.get_submodule(module).bias.shape)
        found[f"{native('head.head')}.diff"] = draw(*network.head.head.weight.shape)
        return [Use(found)]

    assert compare(task, tensors) == 2 * (len(modules) + 1)


def test_several_loras_of_several_spellings(compare, draw, task):
    """A distillation LoRA and two styles, of other ranks and strengths, one taken away."""
    modules = block_matrices(task)

    def three(network):
        return [
            Use(pairs(network, modules, draw, native, UP_DOWN), 1.0),
            Use(pairs(network, modules[1:], draw, diffusers, A_B, rank=3), 0.4),
            Use(pairs(network, modules, draw, kohya, UP_DOWN, alpha=2.0, rank=7), -1.3),
        ]

    assert compare(task, three) == len(modules)


def test_a_text_to_video_lora_on_an_image_to_video_network(compare, draw):
    """What is for the image stays as it was; diffusers adds pairs of zeros there."""
    modules = block_matrices("t2v")
    assert compare("i2v", lambda n: [Use(pairs(n, modules, draw, native, UP_DOWN))]) == len(modules)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_bias": True}],
    ids=["alpha / r", "rslora", "with biases"],
)
def test_a_folder_that_peft_saved(transformer_pair, same_weights, task, settings, tmp_path):
    """Names behind `base_model.model.`, the scale in adapter_config.json; PEFT is the reference."""
    reference, network = transformer_pair(torch.float64, sizes=SIZES[task])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "proj_out"]
    targets += ["add_k_proj"] if task == "i2v" else []
    asked = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=targets, init_lora_weights=False, **settings
    )
    adapted = peft.get_peft_model(reference, asked, autocast_adapter_dtype=False)
    nn.Module.to(adapted, torch.float64)
    adapted.save_pretrained(tmp_path)
    after = merged(network, [tmp_path / "adapter_model.safetensors"], [1.0])
    changed = same_weights(before, after, adapted.merge_and_unload().state_dict())
    pairs = 2 * (9 + (task == "i2v")) + 1
    assert changed == pairs * (2 if "lora_bias" in settings else 1)


def test_what_diffusers_leaves_out_is_added_too(transformer_pair, draw, task, tmp_path):
    """`diff_m`, and `diff` and `diff_b` of norms and patches: W + strength * difference."""
    _, network = transformer_pair(torch.float64, sizes=SIZES[task])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    tensors, expected = {}, {}
    for name, parameter in before.items():
        module, _, leaf = name.rpartition(".")
        if "norm" in name or leaf == "modulation" or "patch" in name or name.startswith("img_emb"):
            tensors[f"{native(module)}.{endings[leaf]}"] = delta = draw(*parameter.shape)
            expected[name] = parameter + 0.7 * delta
    assert {"head.modulation", "blocks.1.modulation", "blocks.0.norm3.bias"} <= expected.keys()
    assert {"patch_embedding.weight", "blocks.1.cross_attn.norm_k.weight"} <= expected.keys()
    assert ("blocks.0.cross_attn.norm_k_img.weight" in expected) == (task == "i2v")
    after = merged(network, [save(tensors, tmp_path / "lora.safetensors")], [0.7])
    assert all(torch.equal(after[name], expected.get(name, before[name])) for name in before)
