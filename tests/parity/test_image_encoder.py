"""The image encoder computes what transformers' CLIP computes, and prepares images as Wan does."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection

from benchmarks import reference as transformers
from models import checkpoint, config, image_encoder, weight_names

SMALL = config.ImageEncoderConfig(
    image_size=42, patch_size=14, dim=48, ffn_dim=80, num_heads=4, num_layers=4
)


def randomised(network):
    """No parameter stays at its zero or one: a swapped or forgotten tensor then shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 9
        parameter.data = is_scale + noise / fan_in**0.5
    return network.eval().requires_grad_(False)


@pytest.fixture
def image_encoder_pair():
    """(reference, ours) with equal weights, through the name table."""

    def build(dtype, *, kind=CLIPVisionModel, sizes=SMALL):
        reference = randomised(kind(transformers.clip_config(sizes))).to(dtype)
        ours = image_encoder.ImageEncoder(sizes).to(dtype)
        names = weight_names.image_encoder_from_transformers(ours.state_dict())
        theirs = {
            names[name]: tensor
            for name, tensor in reference.state_dict().items()
            if not weight_names.UNUSED_OF_CLIP.match(name)
        }
        ours.load_state_dict(checkpoint.joined_qkv(theirs, ours.state_dict().keys()))
        return reference, ours.eval().requires_grad_(False)

    return build


def penultimate(reference, pixels):
    return reference(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_tokens_agree_in_fp64(kind, image_encoder_pair, draw, relative_error):
    reference, ours = image_encoder_pair(torch.float64, kind=kind)
    pixels = draw(2, 3, 42, 42)
    tokens = ours.visual(pixels)
    assert tokens.shape == (2, 10, 48)
    assert relative_error(tokens, penultimate(reference, pixels)) < 1e-12


def test_tokens_agree_in_fp32(image_encoder_pair, draw, relative_error):
    reference, ours = image_encoder_pair(torch.float32)
    pixels = draw(2, 3, 42, 42, dtype=torch.float32)
    assert relative_error(ours.visual(pixels), penultimate(reference, pixels)) < 1e-5


def test_fp16_is_as_close_to_fp64_as_the_reference(image_encoder_pair, draw, relative_error):
    pixels = draw(1, 3, 42, 42).half()
    exact, _ = image_encoder_pair(torch.float16)
    truth = penultimate(exact.double(), pixels.double())
    reference, ours = image_encoder_pair(torch.float16)
    theirs = relative_error(penultimate(reference, pixels), truth)
    own = relative_error(ours.visual(pixels), truth)
    assert own <= 1.1 * theirs, f"ours {own:.2e}, transformers {theirs:.2e}"


def test_the_last_block_and_the_norm_after_it_are_not_run(image_encoder_pair, draw):
    reference, ours = image_encoder_pair(torch.float64)
    pixels = draw(1, 3, 42, 42)
    before = ours.visual(pixels)
    for parameter in ours.visual.transformer[-1].parameters():
        parameter.data.fill_(float("nan"))
    assert torch.equal(ours.visual(pixels), before)
    last = reference(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    assert (last - before).abs().max() > 0.1


def test_names_shapes_and_count_at_full_size():
    with torch.device("meta"):
        ours = image_encoder.ImageEncoder(config.CLIP_VIT_H_14).state_dict()
        theirs = CLIPVisionModel(transformers.clip_config(config.CLIP_VIT_H_14)).state_dict()
    names = weight_names.image_encoder_from_transformers(ours)
    used = {k: t for k, t in theirs.items() if not weight_names.UNUSED_OF_CLIP.match(k)}
    assert theirs.keys() - used.keys() == {"post_layernorm.weight", "post_layernorm.bias"}
    parts = {part for name in ours for part in weight_names.split_qkv(name)}
    assert {names[name] for name in used} == parts
    sizes = {names[name]: tensor.numel() for name, tensor in used.items()}
    for name, tensor in ours.items():
        assert sum(sizes[part] for part in weight_names.split_qkv(name)) == tensor.numel()
    # With the norm after it and the projection to 1024: the tower's 632 million.
    assert sum(tensor.numel() for tensor in ours.values()) == 630_763_520
    assert 630_763_520 + 2 * 1280 + 1280 * 1024 == 632_076_800


def test_native_names_are_those_of_the_official_checkpoint():
    with torch.device("meta"):
        network = image_encoder.ImageEncoder(config.CLIP_VIT_H_14)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    anchors = {
        "visual.cls_embedding": (1, 1, 1280),
        "visual.pos_embedding": (1, 257, 1280),
        "visual.patch_embedding.weight": (1280, 3, 14, 14),
        "visual.pre_norm.bias": (1280,),
        "visual.transformer.0.norm1.weight": (1280,),
        "visual.transformer.31.attn.to_qkv.weight": (3840, 1280),
        "visual.transformer.31.attn.proj.bias": (1280,),
        "visual.transformer.31.norm2.bias": (1280,),
        "visual.transformer.31.mlp.0.weight": (5120, 1280),
        "visual.transformer.31.mlp.2.weight": (1280, 5120),
    }
    assert {name: shapes[name] for name in anchors} == anchors
    assert "visual.patch_embedding.bias" not in shapes


def test_what_clip_has_beside_the_tower_is_known():
    used = image_encoder.ImageEncoder(SMALL).state_dict()
    assert not [name for name in used if weight_names.UNUSED_OF_CLIP.match(name)]
    for name in ("textual.token_embedding.weight", "log_scale", "visual.head"):
        assert weight_names.UNUSED_OF_CLIP.match(name)
    assert not weight_names.UNUSED_OF_CLIP.match("visual.header.weight")


def test_a_whole_encode_agrees_on_the_same_pixels(image_encoder_pair, draw, relative_error):
    """Stretched, not cropped; written out here with its constants."""
    reference, ours = image_encoder_pair(torch.float64)
    image = draw(1, 3, 30, 71).tanh()
    square = torch.nn.functional.interpolate(image, (42, 42), mode="bicubic", antialias=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    expected = penultimate(reference, ((square + 1) / 2 - mean) / std)
    assert relative_error(ours.encode(image), expected) < 1e-12


def processed(picture):
    """Pixels of transformers' processor: aspect kept, antialiased, the middle cropped."""
    return CLIPImageProcessor()(images=picture, return_tensors="pt")["pixel_values"].double()


def prepared(picture):
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = levels.view(picture.height, picture.width, 3).permute(2, 0, 1)[None].double()
    return image_encoder.prepare(image / 127.5 - 1, 224)


def test_clips_own_processor_differs_by_cropping_and_antialiasing(relative_error):
    """A square image that is not shrunk comes out the same; others do not, on purpose."""
    ramp = Image.linear_gradient("L")
    square = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    same = square.resize((224, 224))
    # Between the two is one rounding to 8 bits at most: 1 / 255 over the smallest std.
    assert (prepared(same) - processed(same)).abs().max() < 1 / 255 / 0.26
    wide = square.resize((448, 224))
    cropped = wide.crop((112, 0, 336, 224))
    assert (processed(wide) - prepared(cropped)).abs().max() < 1 / 255 / 0.26
    assert (processed(wide) - prepared(wide)).abs().max() > 0.5
