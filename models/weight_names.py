"""Names of tensors: native Wan (which our networks use), diffusers, native T5, transformers."""

import re
from collections.abc import Iterable

Rules = tuple[tuple[str, str], ...]
"""(pattern, replacement), applied in order to one name"""

# The affine norm before cross-attention is norm3 in native Wan and norm2 in diffusers.
TRANSFORMER: Rules = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.head\.", "proj_out."),
    (r"^(head\.|(blocks\.\d+\.))modulation$", r"\2scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.attn2\.([kv])_img\.", r".attn2.add_\1_proj."),
    (r"\.attn2\.norm_k_img\.", ".attn2.norm_added_k."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Before all names of a transformer that ComfyUI has saved, or a trainer that wraps its network."""

VAE: Rules = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

TEXT_ENCODER: Rules = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
"""Native T5 to transformers: here the network itself has transformers' names."""

TEXT_ENCODER_LAYER = (
    "norm1.weight",
    "norm2.weight",
    "attn.q.weight",
    "attn.k.weight",
    "attn.v.weight",
    "attn.o.weight",
    "pos_embedding.embedding.weight",
    "ffn.gate.0.weight",
    "ffn.fc1.weight",
    "ffn.fc2.weight",
)


IMAGE_ENCODER: Rules = (
    (r"^visual\.cls_embedding$", "embeddings.class_embedding"),
    (r"^visual\.patch_embedding\.", "embeddings.patch_embedding."),
    (r"^visual\.pos_embedding$", "embeddings.position_embedding.weight"),
    (r"^visual\.pre_norm\.", "pre_layrnorm."),
    (r"^visual\.transformer\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)
"""Of CLIP's visual tower, native to transformers, where q, k and v are apart."""

UNUSED_OF_CLIP = re.compile(
    r"(textual\.|log_scale$|visual\.post_norm\.|visual\.head$"  # native
    r"|(vision_model\.)?(post_layernorm\.|embeddings\.position_ids$)|visual_projection\.)"
)
"""The text tower, and what follows the last block: in the files, not in our network."""


def rename(name: str, rules: Rules) -> str:
    """Apply every rule in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def transformer_from_diffusers(native_names: Iterable[str]) -> dict[str, str]:
    """diffusers' name of each tensor of a transformer -> its native name."""
    return _inverse({native: rename(native, TRANSFORMER) for native in native_names})


def common_prefix(names: Iterable[object], prefixes: Iterable[str]) -> str:
    """Which of these all names begin with; empty: with none."""
    begun = [str(name) for name in names]
    found = (prefix for prefix in prefixes if all(name.startswith(prefix) for name in begun))
    return next(found, "")


def vae_from_diffusers(native_names: Iterable[str], *, num_res_blocks: int) -> dict[str, str]:
    """diffusers' name of each tensor of an autoencoder -> its native name."""
    return _inverse(
        {native: rename(_grouped_upsamples(native, num_res_blocks), VAE) for native in native_names}
    )


def text_encoder_to_transformers(num_layers: int) -> dict[str, str]:
    """Native name of each tensor of a T5 encoder -> transformers' name."""
    layers = [f"blocks.{i}.{name}" for i in range(num_layers) for name in TEXT_ENCODER_LAYER]
    natives = ["token_embedding.weight", *layers, "norm.weight"]
    return {native: rename(native, TEXT_ENCODER) for native in natives}


def image_encoder_from_transformers(native_names: Iterable[str]) -> dict[str, str]:
    """transformers' name of each tensor of the visual tower -> its native name.

    A native `to_qkv` is there as `to_q`, `to_k` and `to_v`. CLIPVisionModelWithProjection and
    transformers before 5 put `vision_model.` in front of every name; both spellings are here.
    """
    split = [part for native in native_names for part in split_qkv(native)]
    bare = _inverse({native: rename(native, IMAGE_ENCODER) for native in split})
    return bare | {f"vision_model.{foreign}": native for foreign, native in bare.items()}


def split_qkv(native: str) -> list[str]:
    """The names of the parts that a native tensor has in transformers, in their order."""
    if ".to_qkv." not in native:
        return [native]
    return [native.replace(".to_qkv.", f".to_{part}.") for part in "qkv"]


def _grouped_upsamples(native: str, num_res_blocks: int) -> str:
    """Native numbers the decoder's layers through; diffusers groups them by resolution."""
    match = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", native)
    if match is None:
        return native
    stage, layer = divmod(int(match[1]), num_res_blocks + 2)
    is_resnet = layer <= num_res_blocks
    kind = f"resnets.{layer}" if is_resnet else "upsamplers.0"
    return f"decoder.up_blocks.{stage}.{kind}.{match[2]}"


def _inverse(names: dict[str, str]) -> dict[str, str]:
    inverse = {foreign: native for native, foreign in names.items()}
    assert len(inverse) == len(names), "two tensors would share a name"
    return inverse
