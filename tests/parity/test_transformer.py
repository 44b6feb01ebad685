"""The transformer computes what diffusers' WanTransformer3DModel computes."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from models import config, transformer, weight_names

# diffusers' image-to-video attention takes the last 512 rows for text, whatever the config says.
IMAGE_SIZES = config.TransformerConfig(
    dim=48, ffn_dim=80, num_heads=2, num_layers=2, in_dim=36, text_dim=40, image_dim=32
)


def inputs(draw, sizes, dtype=torch.float64, batch=2):
    latents = draw(batch, sizes.in_dim, 3, 6, 10, dtype=dtype)
    timestep = torch.tensor([937.5001, 625.0][:batch], dtype=torch.float32)
    context = draw(batch, sizes.text_len, sizes.text_dim, dtype=dtype)
    context[:, sizes.text_len // 2 :] = 0
    return latents, timestep, context


def test_velocity_agrees_in_fp64(transformer_pair, in_fp64, draw, relative_error):
    reference, ours = transformer_pair(torch.float64)
    latents, timestep, context = inputs(draw, ours.config)
    expected = reference(latents, timestep, context).sample
    velocity = ours(latents, timestep, context)
    assert velocity.dtype == torch.float64
    assert (velocity - expected).abs().max() < 1e-10
    assert relative_error(velocity, expected) < 1e-12


def test_velocity_agrees_in_fp32(transformer_pair, draw, relative_error):
    """With diffusers exactly as it is: fp32 RoPE tables and an fp32 sinusoid."""
    reference, ours = transformer_pair(torch.float32, exact_time=False)
    latents, timestep, context = inputs(draw, ours.config, torch.float32)
    expected = reference(latents, timestep, context).sample
    assert relative_error(ours(latents, timestep, context), expected) < 1e-5


def test_bf16_is_as_close_to_fp64_as_the_reference(
    transformer_pair, in_fp64, draw, relative_error, monkeypatch
):
    """Both keep in fp32 what they keep: diffusers its list, we ours; same bf16 weights."""
    exact, ours = transformer_pair(torch.bfloat16)
    torch.nn.Module.to(exact, torch.float64)
    latents, timestep, context = inputs(draw, ours.config, torch.bfloat16)
    truth = exact(latents.double(), timestep, context.double()).sample
    monkeypatch.undo()

    reference, ours = transformer_pair(torch.bfloat16, exact_time=False)
    for name, parameter in reference.named_parameters():
        if any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    for name, parameter in ours.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
    theirs = relative_error(reference(latents, timestep, context).sample, truth)
    own = relative_error(ours(latents, timestep, context), truth)
    assert own <= 1.1 * theirs, f"ours {own:.2e}, diffusers {theirs:.2e}"


def test_bf16_weights_without_fp32_copies_are_computed_in_fp32_all_the_same(
    transformer_pair, draw, relative_error
):
    """A plain `.to(bfloat16)` changes only how parameters are stored, not where fp32 is used."""
    _, plain = transformer_pair(torch.bfloat16)
    _, kept = transformer_pair(torch.bfloat16)
    for name, parameter in kept.named_parameters():
        parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
    latents, timestep, context = inputs(draw, plain.config, torch.bfloat16)
    velocity = plain(latents, timestep, context)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, kept(latents, timestep, context))


def test_image_to_video_velocity_agrees_in_fp64(transformer_pair, in_fp64, draw, relative_error):
    reference, ours = transformer_pair(torch.float64, sizes=IMAGE_SIZES)
    latents, timestep, context = inputs(draw, IMAGE_SIZES)
    image = draw(2, 9, IMAGE_SIZES.image_dim)
    expected = reference(latents, timestep, context, image).sample
    assert relative_error(ours(latents, timestep, context, image), expected) < 1e-12


def test_a_swapped_norm_would_show(transformer_pair, in_fp64, draw, relative_error):
    """The gate can fail: without the affine norm before cross-attention the outputs part."""
    reference, ours = transformer_pair(torch.float64)
    for block in ours.blocks:
        block.norm3.weight.data.fill_(1)
    latents, timestep, context = inputs(draw, ours.config)
    expected = reference(latents, timestep, context).sample
    assert relative_error(ours(latents, timestep, context), expected) > 1e-3


@pytest.mark.parametrize(
    ("sizes", "diffusers_sizes", "num_parameters"),
    [
        (
            config.WAN_T2V_1_3B,
            {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
            1_418_996_800,
        ),
        (config.WAN_T2V_14B, {}, 14_288_491_584),
        (
            config.WAN_I2V_14B,
            {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
            16_394_878_784,
        ),
    ],
    ids=["t2v-1.3B", "t2v-14B", "i2v-14B"],
)
def test_names_and_shapes_at_full_size(sizes, diffusers_sizes, num_parameters):
    with torch.device("meta"):
        ours = transformer.WanTransformer(sizes).state_dict()
        theirs = WanTransformer3DModel(out_channels=16, **diffusers_sizes).state_dict()
    names = weight_names.transformer_from_diffusers(ours)
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert {names[name]: tensor.shape for name, tensor in theirs.items()} == shapes
    assert sum(tensor.numel() for tensor in ours.values()) == num_parameters


DIM, FFN_DIM = 5120, 13824
ANCHORS = {
    "patch_embedding.weight": (DIM, 36, 1, 2, 2),
    "text_embedding.0.weight": (DIM, 4096),
    "text_embedding.2.bias": (DIM,),
    "time_embedding.0.weight": (DIM, 256),
    "time_embedding.2.weight": (DIM, DIM),
    "time_projection.1.weight": (6 * DIM, DIM),
    "blocks.39.modulation": (1, 6, DIM),
    "blocks.0.self_attn.q.weight": (DIM, DIM),
    "blocks.0.self_attn.o.bias": (DIM,),
    "blocks.0.self_attn.norm_k.weight": (DIM,),
    "blocks.0.norm3.weight": (DIM,),
    "blocks.0.cross_attn.v.weight": (DIM, DIM),
    "blocks.0.cross_attn.k_img.weight": (DIM, DIM),
    "blocks.0.cross_attn.v_img.bias": (DIM,),
    "blocks.0.cross_attn.norm_k_img.weight": (DIM,),
    "blocks.0.ffn.0.weight": (FFN_DIM, DIM),
    "blocks.0.ffn.2.weight": (DIM, FFN_DIM),
    "head.head.weight": (64, DIM),
    "head.modulation": (1, 2, DIM),
    "img_emb.proj.0.weight": (1280,),
    "img_emb.proj.1.weight": (1280, 1280),
    "img_emb.proj.3.weight": (DIM, 1280),
    "img_emb.proj.4.bias": (DIM,),
}


def test_native_names_and_shapes_are_those_of_the_official_checkpoints():
    """Anchors, written by hand: a rename would still pass the comparison through the name map."""
    with torch.device("meta"):
        i2v = transformer.WanTransformer(config.WAN_I2V_14B).state_dict()
        t2v = transformer.WanTransformer(config.WAN_T2V_14B).state_dict()
    assert {name: tuple(i2v[name].shape) for name in ANCHORS} == ANCHORS
    assert len(i2v) == 15 + 40 * (27 + 5) + 8
    only_for_images = {name for name in i2v if "_img" in name or name.startswith("img_emb.")}
    assert i2v.keys() - t2v.keys() == only_for_images
    assert t2v["patch_embedding.weight"].shape == (DIM, 16, 1, 2, 2)
    others = t2v.keys() - {"patch_embedding.weight"}
    assert all(t2v[name].shape == i2v[name].shape for name in others)
