"""Every spelling of a LoRA gives the same weights; what is not understood is an error, never less.

The network is tiny and its LoRA has what LightX2V's has: pairs, and differences of norms, biases,
modulation and head.
"""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from models import config, errors, lora, lora_keys, lora_switcher, transformer, weight_names
from models.lora_keys import Role
from models.lora_switcher import Choice

SIZES = config.TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=20, text_len=8
)
IMAGE_SIZES = config.TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16, text_dim=20, text_len=8,
    in_dim=36, image_dim=18,
)  # fmt: skip
WITHOUT_TOKENS = dataclasses.replace(IMAGE_SIZES, image_dim=None)
"""As Wan2.2: the image is in the latents only."""
RANK = 4
MATRICES = (
    "blocks.0.self_attn.q",
    "blocks.1.self_attn.o",
    "blocks.0.cross_attn.k",
    "blocks.1.ffn.0",
    "blocks.0.ffn.2",
    "time_projection.1",
    "text_embedding.0",
)


def build(sizes=SIZES, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    network = transformer.WanTransformer(sizes)
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    return network.to(dtype).requires_grad_(False).eval()


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def random_pairs(network, modules=MATRICES, rank=RANK, seed=1, dtype=torch.float32):
    """module -> (down, up) for the native modules."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    pairs = {}
    for module in modules:
        out_features, in_features = shapes[f"{module}.weight"]
        down = torch.randn(rank, in_features, generator=generator)
        up = torch.randn(out_features, rank, generator=generator)
        pairs[module] = (down.to(dtype), up.to(dtype))
    return pairs


def spelled(pairs, prefix, ending, *, naming=lambda module: module):
    """A LoRA's tensors: `ending` is (down, up)."""
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"{prefix}{naming(module)}{ending[0]}"] = down
        tensors[f"{prefix}{naming(module)}{ending[1]}"] = up
    return tensors


def diffusers_name(module):
    return weight_names.rename(f"{module}.", weight_names.TRANSFORMER)[:-1]


def underscored(module):
    return module.replace(".", "_")


def unchanged(module):
    return module


def every_spelling():
    for ending in lora_keys.PAIRS:
        yield pytest.param("diffusion_model.", ending, unchanged, id=ending[1])
    for prefix in ("", *lora_keys.PREFIXES):
        if not prefix.endswith("_"):
            yield pytest.param(prefix, lora_keys.PAIRS[1], unchanged, id=f"prefix {prefix}")
    kohya = lora_keys.PAIRS[0]
    yield pytest.param("transformer.", lora_keys.PAIRS[1], diffusers_name, id="diffusers")
    yield pytest.param("transformer.", lora_keys.PAIRS[5], diffusers_name, id="old diffusers")
    peft = "base_model.model.transformer."
    yield pytest.param(peft, lora_keys.PAIRS[2], diffusers_name, id="PEFT, diffusers")
    for prefix in ("lora_unet_", "lora_unet__", "lycoris_"):
        yield pytest.param(prefix, kohya, underscored, id=f"kohya, {prefix}")
    yield pytest.param(
        "lora_unet_", kohya, lambda m: underscored(diffusers_name(m)), id="kohya, diffusers"
    )


@pytest.fixture
def network():
    return build()


@pytest.fixture
def save(tmp_path):
    def write(tensors, name="style.safetensors", metadata=None):
        path = tmp_path / name
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        return path

    return write


def read(path, network):
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    return lora.read(path, shapes)


def merged(network, path, strength=1.0):
    switcher = lora_switcher.LoraSwitcher(network)
    switcher.apply([Choice(path=path, strength=strength)])
    return weights(network)


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(("prefix", "ending", "naming"), list(every_spelling()))
def test_every_spelling_of_a_lora_gives_the_same_weights_and_leaves_no_trace(
    network, save, prefix, ending, naming, alpha
):
    before, pairs = weights(network), random_pairs(network)
    expected = dict(before)
    for module, (down, up) in pairs.items():
        scaled = up @ down * (1 if alpha is None else alpha / RANK)
        expected[f"{module}.weight"] = before[f"{module}.weight"] + scaled
    tensors = spelled(pairs, prefix, ending, naming=naming)
    for module in pairs if alpha else ():
        tensors[f"{prefix}{naming(module)}.alpha"] = torch.tensor(alpha)
    path = save(tensors)
    switcher = lora_switcher.LoraSwitcher(network)
    switcher.apply([Choice(path=path)])
    assert equal(weights(network), expected)
    switcher.apply([])
    assert equal(weights(network), before)


# As trainers write them, letter by letter.
KEYS_OF_OTHERS = {
    "diffusion_model.blocks.0.ffn.0.lora_down.weight": Role.DOWN,
    "diffusion_model.blocks.0.ffn.0.lora_A": Role.DOWN,
    "model.diffusion_model.blocks.0.ffn.0.lora_B.weight": Role.UP,
    "pipe.dit.blocks.0.ffn.0.lora_A.default.weight": Role.DOWN,
    "base_model.model.blocks.0.ffn.0.lora_B.default.weight": Role.UP,
    "model.blocks.0.ffn.0.lora_B": Role.UP,
    "unet.blocks.0.ffn.0.lora_A.weight": Role.DOWN,
    "transformer_2.blocks.0.ffn.net.0.proj.lora_A.weight": Role.DOWN,
    "transformer.blocks.0.ffn.net.0.proj.lora.down.weight": Role.DOWN,
    "transformer.blocks.0.ffn.net.0.proj_lora.up.weight": Role.UP,
    "transformer.blocks.0.ffn.net.0.proj.lora_linear_layer.down.weight": Role.DOWN,
    "lora_unet_blocks_0_ffn_0.alpha": Role.ALPHA,
    "lora_unet__blocks_0_ffn_0.lora_up.weight": Role.UP,
    "lycoris_blocks_0_ffn_0.lora_down.weight": Role.DOWN,
    "diffusion_model.blocks.0.ffn.0.diff": Role.DELTA,
    "diffusion_model.blocks.0.ffn.0.diff_b": Role.DELTA,
    "diffusion_model.blocks.0.ffn.0.lora_up.bias": Role.UP_BIAS,
    "diffusion_model.blocks.0.ffn.0.lora_B.bias": Role.UP_BIAS,
    "base_model.model.blocks.0.ffn.0.lora_B.default.bias": Role.UP_BIAS,
}


@pytest.mark.parametrize(("key", "role"), KEYS_OF_OTHERS.items())
def test_keys_of_other_trainers_are_understood(network, key, role):
    leaf = "bias" if key.endswith(("bias", "diff_b")) else "weight"
    names = lora_keys.Names(name for name, _ in network.named_parameters())
    assert names.find(key) == (f"blocks.0.ffn.0.{leaf}", role)


def distillation_tensors(network, seed=2):
    """What LightX2V's LoRAs have beside pairs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}

    def draw(name):
        return torch.randn(shapes[name], generator=generator)

    tensors = spelled(random_pairs(network), "diffusion_model.", lora_keys.PAIRS[0])
    deltas = {}
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            key = module + {"bias": ".diff_b", "modulation": ".diff_m"}[leaf]
        elif len(shapes[name]) != 2 or name == "head.head.weight":
            key = f"{module}.diff"
        else:
            continue
        deltas[name] = tensors[f"diffusion_model.{key}"] = draw(name)
    return tensors, deltas


def test_differences_of_norms_biases_modulation_head_and_patches_are_added(network, save):
    before = weights(network)
    tensors, deltas = distillation_tensors(network)
    assert {"head.modulation", "blocks.0.modulation", "patch_embedding.weight"} <= deltas.keys()
    assert {"blocks.0.norm3.weight", "blocks.0.self_attn.norm_q.weight"} <= deltas.keys()
    after = merged(network, save(tensors), strength=0.5)
    for name, delta in deltas.items():
        assert torch.equal(after[name], before[name] + 0.5 * delta), name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == deltas.keys() | {f"{module}.weight" for module in MATRICES}


def test_a_pair_may_come_with_a_bias_and_with_a_whole_difference(network, save):
    before = weights(network)
    down, up = torch.randn(RANK, 24), torch.randn(24, RANK)
    bias, whole = torch.randn(24), torch.randn(24, 24)
    path = save({
        "transformer.blocks.0.attn1.to_q.lora_A.weight": down,
        "transformer.blocks.0.attn1.to_q.lora_B.weight": up,
        "transformer.blocks.0.attn1.to_q.lora_B.bias": bias,
        "transformer.blocks.0.attn1.to_q.diff": whole,
    })  # fmt: skip
    after = merged(network, path)
    name = "blocks.0.self_attn.q"
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"] + bias)
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"] + (up @ down + whole))


@pytest.mark.parametrize(("alpha", "scale"), [(2.0, 0.5), (4.0, 1.0), (0.0, 1.0), (None, 1.0)])
def test_alpha_over_rank_scales_and_none_or_zero_means_one(network, save, alpha, scale):
    before, pairs = weights(network), random_pairs(network, MATRICES[:1])
    tensors = spelled(pairs, "lora_unet_", lora_keys.PAIRS[0], naming=underscored)
    if alpha is not None:
        tensors["lora_unet_blocks_0_self_attn_q.alpha"] = torch.tensor(alpha)
    after = merged(network, save(tensors))
    down, up = pairs[MATRICES[0]]
    name = f"{MATRICES[0]}.weight"
    assert torch.equal(after[name], before[name] + (up @ down) * scale)


def test_peft_settings_in_the_header_or_beside_the_file_give_the_scale(network, save):
    pairs = random_pairs(network, MATRICES[:1])
    tensors = spelled(pairs, "base_model.model.", lora_keys.PAIRS[1])
    name = f"{MATRICES[0]}.weight"
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})}
    assert read(save(tensors, metadata=header), network).pairs[name].scale == 0.5
    header = {"lora_config": json.dumps({"r": RANK, "lora_alpha": 2, "target_modules": ".*"})}
    assert read(save(tensors, metadata=header), network).pairs[name].scale == 0.5
    path = save(tensors, "adapter_model.safetensors")
    assert read(path, network).pairs[name].scale == 1
    beside = path.with_name("adapter_config.json")
    beside.write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    assert read(path, network).pairs[name].scale == 4  # 8 / sqrt(4)
    beside.write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"q": 1}}))
    with pytest.raises(errors.UnfitLoraError, match="alpha_pattern"):
        read(path, network)


@pytest.mark.parametrize(("prefix", "scale"), [("transformer.", 0.5), ("transformer_2.", 0.25)])
def test_settings_are_those_of_the_transformer_that_the_file_is_for(network, save, prefix, scale):
    pairs = random_pairs(network, MATRICES[:1])
    tensors = spelled(pairs, prefix, lora_keys.PAIRS[1], naming=diffusers_name)
    told = {"transformer.lora_alpha": 2, "transformer_2.lora_alpha": 1}
    path = save(tensors, metadata={"lora_adapter_metadata": json.dumps(told)})
    assert read(path, network).pairs[f"{MATRICES[0]}.weight"].scale == scale


def test_loras_of_two_transformers_in_one_file_are_refused(network, save):
    """Else those of other layers would be merged into one."""
    tensors = {}
    for prefix, module in zip(("transformer.", "transformer_2."), MATRICES, strict=False):
        tensors |= spelled(random_pairs(network, [module]), prefix, lora_keys.PAIRS[1])
    with pytest.raises(errors.UnfitLoraError, match=r"two transformers .* split it"):
        read(save(tensors), network)


def test_settings_of_another_file_in_the_folder_scale_nothing(network, save):
    pairs = random_pairs(network, MATRICES[:1])
    path = save(spelled(pairs, "diffusion_model.", lora_keys.PAIRS[0]), "style.safetensors")
    path.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))
    assert read(path, network).pairs[f"{MATRICES[0]}.weight"].scale == 1


def test_a_pair_for_the_patch_convolution(network, save):
    before = weights(network)["patch_embedding.weight"]
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(24, RANK, 1, 1, 1)
    prefix = "transformer.patch_embedding"
    path = save({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up})
    after = merged(network, path)["patch_embedding.weight"]
    assert torch.equal(after, before + (up.flatten(1) @ down.flatten(1)).view_as(before))


@pytest.mark.parametrize("form", ["pair", "difference"])
def test_a_text_to_video_lora_changes_what_image_to_video_does_with_its_latents(save, form):
    """LightX2V's distillation LoRAs have a difference of the patch convolution."""
    network = build(IMAGE_SIZES)
    before = weights(network)["patch_embedding.weight"]
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(24, RANK, 1, 1, 1)
    change = (up.flatten(1) @ down.flatten(1)).view(24, 16, 1, 2, 2)
    prefix = "diffusion_model.patch_embedding"
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
    path = save({f"{prefix}.diff": change} if form == "difference" else tensors)
    after = merged(network, path)["patch_embedding.weight"]
    assert torch.allclose(after[:, :16], before[:, :16] + change, atol=1e-5)
    assert torch.equal(after[:, 16:], before[:, 16:])


@pytest.mark.parametrize("channels", [0, 1, 15, 17, 35])
def test_a_change_of_other_channels_than_those_of_latents_fits_nothing(save, channels):
    tensors = {"diffusion_model.patch_embedding.diff": torch.zeros(24, channels, 1, 2, 2)}
    assert refused(build(IMAGE_SIZES), save(tensors)).wrong_shapes


def test_merging_rounds_once_from_fp32(save):
    network = build(dtype=torch.bfloat16)
    before, pairs = weights(network), random_pairs(network, dtype=torch.bfloat16)
    path = save(spelled(pairs, "diffusion_model.", lora_keys.PAIRS[0]))
    after = merged(network, path, strength=0.7)
    for module, (down, up) in pairs.items():
        name = f"{module}.weight"
        exact = before[name].float() + 0.7 * (up.float() @ down.float())
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], exact.bfloat16())


def test_two_loras_are_the_sum_of_their_differences_in_any_order(save):
    network = build(dtype=torch.bfloat16)
    before = weights(network)
    paths = [
        save(spelled(random_pairs(network, seed=seed, rank=rank), "", lora_keys.PAIRS[1]), name)
        for seed, rank, name in [(1, 4, "b.safetensors"), (5, 7, "a.safetensors")]
    ]
    choices = [Choice(path=paths[0], strength=0.8), Choice(path=paths[1], strength=-1.5)]
    switcher = lora_switcher.LoraSwitcher(network)
    switcher.apply(choices)
    first = weights(network)
    switcher.apply([])
    assert equal(weights(network), before)
    switcher.apply(choices[::-1])
    assert equal(weights(network), first)
    name = "blocks.0.self_attn.q.weight"
    deltas = [read(path, network).delta(name, before[name].float()) for path in paths]
    exact = before[name].float() + 0.8 * deltas[0] - 1.5 * deltas[1]
    torch.testing.assert_close(first[name].float(), exact, rtol=2**-8, atol=2**-8)


def test_a_strength_of_zero_leaves_a_lora_out_but_still_reads_it(network, save):
    before = weights(network)
    path = save(spelled(random_pairs(network), "", lora_keys.PAIRS[0]))
    assert equal(merged(network, path, strength=0.0), before)
    with pytest.raises(errors.LoraMismatchError):
        merged(network, save({"other.lora_A.weight": torch.zeros(1, 1)}), strength=0.0)
    with pytest.raises(ValueError, match="must be a number"):
        Choice(path=path, strength=float("nan"))


@pytest.fixture(scope="module")
def three_loras(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("loras"), build()
    found = []
    for seed, modules in [(1, MATRICES[:3]), (2, MATRICES[2:5]), (3, MATRICES[5:])]:
        pairs = random_pairs(network, modules, seed=seed)
        tensors = spelled(pairs, "diffusion_model.", lora_keys.PAIRS[0])
        tensors["diffusion_model.head.diff_m"] = torch.randn(1, 2, 24)
        found.append(folder / f"{seed}.safetensors")
        safetensors.torch.save_file(tensors, found[-1])
    return found


LORA_NUMBERS = st.dictionaries(
    st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, 1.7]), max_size=3
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequence=st.lists(LORA_NUMBERS, min_size=1, max_size=6))
def test_weights_depend_on_the_last_request_only(three_loras, sequence):
    used, fresh = (build(dtype=torch.bfloat16) for _ in range(2))
    switcher = lora_switcher.LoraSwitcher(used)
    for request in sequence:
        choices = [Choice(path=three_loras[i], strength=s) for i, s in request.items()]
        switcher.apply(choices)
    lora_switcher.LoraSwitcher(fresh).apply(choices)
    assert equal(weights(used), weights(fresh))
    switcher.apply([])
    assert equal(weights(used), weights(build(dtype=torch.bfloat16)))


def test_what_was_not_changed_is_not_kept(three_loras):
    network = build(dtype=torch.bfloat16)
    switcher = lora_switcher.LoraSwitcher(network)
    assert switcher.kept_bytes == 0
    switcher.apply([Choice(path=three_loras[0])])
    names = [f"{module}.weight" for module in MATRICES[:3]] + ["head.modulation"]
    tensors = network.state_dict()
    assert switcher.kept_bytes == sum(tensors[name].nbytes for name in names)


def test_untouched_weights_may_be_read_again_instead_of_kept(three_loras):
    network = build()
    before = weights(network)
    switcher = lora_switcher.LoraSwitcher(network, pristine=before.__getitem__)
    for choices in ([Choice(path=three_loras[0])], [Choice(path=three_loras[1])], []):
        switcher.apply(choices)
    assert equal(weights(network), before)
    assert switcher.kept_bytes == 0


def test_weights_in_bf16_are_merged_in_fp32_and_rounded_once(three_loras):
    network = build(dtype=torch.bfloat16)
    expected, choices = weights(network), [Choice(path=three_loras[0], strength=0.3)]
    found = read(three_loras[0], network)
    for name in found.parameters:
        wide = expected[name].float()
        difference = torch.zeros_like(wide)
        if name in found.pairs:
            pair = found.pairs[name]
            difference += (pair.up.float() @ pair.down.float()) * pair.scale
        for delta in found.deltas.get(name, ()):
            difference += delta.float()
        expected[name] = (wide + difference * 0.3).bfloat16()
    pristine = weights(network).__getitem__
    for switcher in (
        lora_switcher.LoraSwitcher(network),
        lora_switcher.LoraSwitcher(network, device="cpu", pristine=pristine),
    ):
        switcher.apply(choices)
        assert equal(weights(network), expected)
        switcher.apply([])


class Copies(TorchDispatchMode):
    """Notes from where to where, and from which dtype to which, tensors are copied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            self.seen.append((source.device, result.device, source.dtype, result.dtype))
        return result


@pytest.mark.parametrize("merges_on", ["meta", "cpu"], ids=["goes there", "comes back"])
def test_what_goes_between_host_and_device_is_not_converted_on_the_way(three_loras, merges_on):
    """torch would convert on the host. `meta` stands for a GPU: as the network's, it takes all."""
    stored = weights(build(dtype=torch.bfloat16))
    network = build(dtype=torch.bfloat16).to("meta")
    switcher = lora_switcher.LoraSwitcher(network, device=merges_on, pristine=stored.__getitem__)
    with Copies() as copies:
        switcher.apply([Choice(path=path) for path in three_loras])
    sent = [dtypes for here, there, *dtypes in copies.seen if here != there]
    assert len(sent) > len(MATRICES)
    assert all(before == after for before, after in sent)


def test_weights_keep_their_place_in_memory(network, three_loras):
    places = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    lora_switcher.LoraSwitcher(network).apply([Choice(path=three_loras[0])])
    assert places == {name: t.data_ptr() for name, t in network.state_dict().items()}


def test_a_file_that_was_replaced_is_read_again(network, save):
    before, switcher = weights(network), lora_switcher.LoraSwitcher(network)
    for value in (1.0, 2.0):
        path = save({"diffusion_model.head.diff_m": torch.full((1, 2, 24), value)})
        switcher.apply([Choice(path=path)])
        assert torch.equal(network.head.modulation, before["head.modulation"] + value)
        path.unlink()
    with pytest.raises(errors.MissingFileError, match=path.name):
        switcher.apply([Choice(path=path)])


def test_an_error_in_one_lora_changes_nothing(network, save):
    before = weights(network)
    good = save(spelled(random_pairs(network), "", lora_keys.PAIRS[0]), "a.safetensors")
    bad = save({"what.diff": torch.zeros(1)}, "b.safetensors")
    switcher = lora_switcher.LoraSwitcher(network)
    with pytest.raises(errors.LoraMismatchError):
        switcher.apply([Choice(path=good), Choice(path=bad)])
    assert equal(weights(network), before)


def test_an_interrupted_change_is_mended_by_the_next(network, save, monkeypatch):
    before = weights(network)
    path = save(spelled(random_pairs(network), "", lora_keys.PAIRS[0]))
    expected = merged(build(), path)
    switcher = lora_switcher.LoraSwitcher(network)
    merge, calls = lora.Lora.delta, []

    def fails_halfway(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return merge(*arguments)

    monkeypatch.setattr(lora.Lora, "delta", fails_halfway)
    with pytest.raises(MemoryError):
        switcher.apply([Choice(path=path)])
    assert not equal(weights(network), before)
    switcher.apply([Choice(path=path)])
    assert equal(weights(network), expected)
    switcher.apply([])
    assert equal(weights(network), before)


# What is refused


def one_pair(name="diffusion_model.blocks.0.self_attn.q", rank=RANK, size=24):
    return {
        f"{name}.lora_down.weight": torch.zeros(rank, size),
        f"{name}.lora_up.weight": torch.zeros(size, rank),
    }


def refused(network, path):
    before = weights(network)
    with pytest.raises(errors.LoraMismatchError) as caught:
        merged(network, path)
    assert equal(weights(network), before)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value


def test_a_lora_of_another_network_matches_nothing(network, save):
    error = refused(network, save(one_pair("lora_te_text_model_encoder_layers_0_mlp_fc1")))
    assert error.matched == 0
    assert len(error.unused) == 2
    assert "0 keys match" in str(error)


def test_an_empty_file_matches_nothing(network, save):
    assert refused(network, save({})).matched == 0


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.self_attn.q.dora_scale",
        "diffusion_model.blocks.7.self_attn.q.diff_b",
        "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
        "diffusion_model.blocks.0.norm1.diff",
        "text_encoder.layers.0.lora_A.weight",
    ],
)
def test_a_key_that_is_not_understood_is_named_with_the_counts(network, save, key):
    error = refused(network, save({**one_pair(), key: torch.zeros(24)}))
    assert (error.matched, error.unused) == (2, (key,))
    assert f"2 keys match the network; 1 keys do not ({key})" in str(error)


@pytest.mark.parametrize(("prefix", "ending", "naming"), list(every_spelling()))
def test_a_layer_that_is_not_there_is_counted_in_every_spelling(
    network, save, prefix, ending, naming
):
    """A block too many, as of a LoRA for a larger network: not half of it is merged."""
    pairs = random_pairs(network)
    pairs["blocks.2.ffn.0"] = (torch.zeros(RANK, 24), torch.zeros(40, RANK))
    error = refused(network, save(spelled(pairs, prefix, ending, naming=naming)))
    unused = sorted(f"{prefix}{naming('blocks.2.ffn.0')}{half}" for half in ending)
    assert (error.matched, error.unused) == (2 * len(MATRICES), tuple(unused))


def test_an_image_to_video_lora_on_a_text_to_video_network_is_named_as_such(network, save):
    path = save({**one_pair(), **one_pair("diffusion_model.blocks.0.cross_attn.k_img")})
    error = refused(network, path)
    assert (error.matched, len(error.unused)) == (2, 2)
    assert "made for image-to-video" in str(error)
    assert "take a LoRA that was made for text-to-video" in str(error)
    image_network = build(IMAGE_SIZES)
    unknown = save({**one_pair("diffusion_model.blocks.9.cross_attn.k_img")}, "other.safetensors")
    assert "made for" not in str(refused(image_network, unknown))
    assert read(path, image_network).parameters == {
        "blocks.0.self_attn.q.weight",
        "blocks.0.cross_attn.k_img.weight",
    }


IMAGE_MODULES = ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1")


@pytest.mark.parametrize(("prefix", "ending", "naming"), list(every_spelling()))
def test_what_is_for_an_image_encoder_is_passed_over_where_wan22_has_none(
    save, prefix, ending, naming
):
    """In every spelling; all else is merged, and taken out again bit for bit."""
    network = build(WITHOUT_TOKENS)
    before = weights(network)
    pairs = random_pairs(build(IMAGE_SIZES), MATRICES + IMAGE_MODULES)
    tensors = spelled(pairs, prefix, ending, naming=naming)
    tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.ones(24)
    alone = {module: pairs[module] for module in MATRICES}
    expected = merged(build(WITHOUT_TOKENS), save(spelled(alone, prefix, ending, naming=naming)))
    path = save(tensors, "wan21.safetensors")
    assert read(path, network).parameters == {f"{module}.weight" for module in MATRICES}
    switcher = lora_switcher.LoraSwitcher(network)
    switcher.apply([Choice(path=path)])
    assert equal(weights(network), expected)
    switcher.apply([])
    assert equal(weights(network), before)


def test_all_other_keys_of_a_wan21_lora_must_match_on_wan22(save):
    network = build(WITHOUT_TOKENS)
    for_images = one_pair("diffusion_model.blocks.0.cross_attn.k_img")
    error = refused(network, save({**one_pair(), **for_images, "other.diff": torch.zeros(1)}))
    assert (error.matched, error.unused) == (2, ("other.diff",))
    assert "Wan2.1" not in str(error)
    assert "All of it is for Wan2.1's image encoder" in str(refused(network, save(for_images)))


def test_a_text_to_video_lora_fits_an_image_to_video_network(save):
    network = build(IMAGE_SIZES)
    before = weights(network)
    pairs = random_pairs(network)
    after = merged(network, save(spelled(pairs, "diffusion_model.", lora_keys.PAIRS[0])))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in MATRICES}


def test_image_parts_in_diffusers_names(save):
    network = build(IMAGE_SIZES)
    modules = ("blocks.1.cross_attn.v_img", "img_emb.proj.1", "img_emb.proj.3")
    pairs = random_pairs(network, modules)
    path = save(spelled(pairs, "transformer.", lora_keys.PAIRS[1], naming=diffusers_name))
    assert read(path, network).parameters == {f"{module}.weight" for module in modules}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("blocks.0.self_attn.q.lora_up.weight", (25, RANK)),
        ("blocks.0.self_attn.q.lora_down.weight", (RANK, 23)),
        ("blocks.0.self_attn.q.lora_down.weight", (RANK + 1, 24)),
        ("blocks.0.self_attn.q.lora_down.weight", (24,)),
        ("blocks.0.self_attn.q.lora_down.weight", ()),
        ("blocks.0.self_attn.q.diff_b", (12,)),
        ("patch_embedding.diff", (24, 36, 1, 2, 2)),
        ("blocks.0.modulation_of_none", ()),
    ],
)
def test_shapes_and_ranks_that_do_not_fit_are_named(network, save, key, shape):
    path = save({**one_pair(), f"diffusion_model.{key}": torch.zeros(shape)})
    error = refused(network, path)
    if key.endswith("none"):
        assert error.unused
    else:
        ((found, expected),) = error.wrong_shapes.values()
        assert found != expected
        assert "of another shape" in str(error)


def test_a_pair_with_a_window_in_its_second_half_is_refused(network, save):
    pair = {
        "diffusion_model.patch_embedding.lora_down.weight": torch.zeros(RANK, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": torch.zeros(24, RANK, 1, 2, 2),
    }
    assert list(refused(network, save(pair)).wrong_shapes) == ["patch_embedding.weight"]


@pytest.mark.parametrize("missing", ["lora_up", "lora_down"])
def test_half_a_pair_is_refused(network, save, missing):
    tensors = {key: tensor for key, tensor in one_pair().items() if missing not in key}
    error = refused(network, save(tensors))
    assert error.incomplete == ("blocks.0.self_attn.q.weight",)


def test_an_alpha_without_a_pair_is_refused(network, save):
    tensors = {**one_pair(), "diffusion_model.blocks.0.self_attn.k.alpha": torch.tensor(4.0)}
    assert refused(network, save(tensors)).incomplete == ("blocks.0.self_attn.k.weight",)


def test_an_alpha_that_is_not_one_number_is_refused(network, save):
    key = "diffusion_model.blocks.0.self_attn.q.alpha"
    for alpha in (torch.tensor([1.0, 2.0]), torch.tensor([])):
        with pytest.raises(errors.UnfitLoraError, match=f"{key} must be one number"):
            read(save({**one_pair(), key: alpha}), network)
    for dtype in (torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(errors.UnfitLoraError, match=f"{key} is {dtype}"):
            read(save({**one_pair(), key: torch.tensor(4.0).to(dtype)}), network)


@pytest.mark.parametrize("alpha", ["x", [4], float("inf"), 10**400])
def test_an_alpha_in_peft_settings_that_is_no_number_is_refused(network, save, alpha):
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})}
    with pytest.raises(errors.UnfitLoraError, match="lora_alpha must be a number"):
        read(save(one_pair(), metadata=header), network)


def test_a_layer_in_two_spellings_is_refused(network, save):
    tensors = {**one_pair(), **one_pair("transformer.blocks.0.attn1.to_q")}
    assert "two spellings" in str(refused(network, save(tensors)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(network, save, value):
    tensors = one_pair()
    name = "diffusion_model.blocks.0.self_attn.q.lora_up.weight"
    tensors[name][3, 2] = value
    assert refused(network, save(tensors)).not_finite == (name,)


def test_a_file_that_is_no_safetensors_is_named(network, tmp_path):
    of_file = {"lora.safetensors": errors.UnreadableWeightsError, "lora.pt": errors.UnfitLoraError}
    for name, error in of_file.items():
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(error) as caught:
            read(tmp_path / name, network)
        assert caught.value.path == tmp_path / name


def test_integer_tensors_are_refused(network, save):
    tensors = {key: tensor.to(torch.int8) for key, tensor in one_pair().items()}
    with pytest.raises(errors.UnfitLoraError, match=r"torch\.int8"):
        read(save(tensors), network)


# Extracting


def test_an_extracted_lora_leads_from_one_network_to_the_other(save):
    base, tuned = weights(build(seed=0)), weights(build(seed=1))
    tuned["blocks.0.ffn.0.weight"] = base["blocks.0.ffn.0.weight"].clone()
    tensors = lora.extract(base, tuned, rank=24, smallest_pair=500, dtype=torch.float32)
    assert not any("blocks.0.ffn.0.lora" in key for key in tensors)
    assert "diffusion_model.blocks.0.self_attn.q.lora_up.weight" in tensors
    assert tensors["diffusion_model.blocks.1.self_attn.q.lora_down.weight"].shape == (24, 24)
    assert "diffusion_model.blocks.0.self_attn.norm_q.diff" in tensors
    assert "diffusion_model.blocks.0.self_attn.q.diff_b" in tensors
    assert "diffusion_model.blocks.0.diff_m" in tensors
    after = merged(build(seed=0), save(tensors))
    for name in base:
        torch.testing.assert_close(after[name], tuned[name], rtol=1e-4, atol=1e-4)


def test_a_lower_rank_is_the_best_of_that_rank(network):
    base = weights(network)
    name = "blocks.0.self_attn.q"
    tuned = {**base, f"{name}.weight": base[f"{name}.weight"] + torch.randn(24, 24)}
    tensors = lora.extract(base, tuned, rank=5, smallest_pair=1, dtype=torch.float32)
    down, up = (tensors[f"diffusion_model.{name}.lora_{half}.weight"] for half in ("down", "up"))
    assert (down.shape, up.shape) == ((5, 24), (24, 5))
    delta = tuned[f"{name}.weight"] - base[f"{name}.weight"]
    best = torch.linalg.svdvals(delta)[5:].norm()
    torch.testing.assert_close((delta - up @ down).norm(), best)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
