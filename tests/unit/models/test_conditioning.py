"""How an image becomes a condition: levels, sizes, padding, mask, and the order of channels."""

import pytest
import torch

from models import checkpoint, conditioning, layout
from models.conditioning import Target
from models.tiny import make

TARGET = Target(width=64, height=48, num_frames=9)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("i2v") / "tiny"
    make.make(root, task=layout.Task.IMAGE_TO_VIDEO)
    return checkpoint.load(layout.find(root), device="cpu", dtype=torch.float32)


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def encode(networks, image, target=TARGET):
    with torch.inference_mode():
        return conditioning.encode(
            image, target, clip=networks.image_encoder, autoencoder=networks.vae
        )


def test_a_condition_is_four_channels_of_mask_and_sixteen_of_latents(networks):
    condition = encode(networks, picture(70, 101))
    assert condition.y_BCTHW.shape == (1, 20, 3, 6, 8)
    assert condition.y_BCTHW.dtype == torch.float32
    assert condition.image_tokens_BIG.shape == (1, 17, 48)


def test_the_mask_is_one_in_all_four_channels_of_the_first_latent_frame():
    """Literally, for 9 frames of 2 x 1 cells, and by the official way of building it."""
    latents = torch.zeros(1, 16, 3, 2, 1)
    mask = conditioning.first_frame_mask(latents, channels=4)
    one, zero = [[1.0], [1.0]], [[0.0], [0.0]]
    assert mask.tolist() == [[[one, zero, zero]] * 4]

    frames = torch.ones(1, 9, 2, 1)
    frames[:, 1:] = 0
    repeated = torch.cat([frames[:, :1].repeat_interleave(4, dim=1), frames[:, 1:]], dim=1)
    official = repeated.view(1, 3, 4, 2, 1).transpose(1, 2)
    assert torch.equal(mask, official)


def test_frames_after_the_first_are_zero_which_is_mid_grey():
    frame = torch.full((1, 3, 2, 2), -1.0)
    frames = conditioning.pad_in_time(frame, 5)
    assert frames.shape == (1, 3, 5, 2, 2)
    assert (frames[:, :, 0] == -1).all()
    assert (frames[:, :, 1:] == 0).all()


def test_the_latents_are_those_of_the_frame_and_zeros(networks):
    image = picture(48, 64)
    frames = torch.zeros(1, 3, 9, 48, 64)
    frames[0, :, 0] = image.permute(2, 0, 1) / 127.5 - 1
    with torch.inference_mode():
        expected = networks.vae.encode(frames)
    found = encode(networks, image).y_BCTHW
    assert torch.allclose(found[:, 4:], expected, atol=1e-5)
    assert torch.equal(found[:, :4], conditioning.first_frame_mask(expected, channels=4))


def test_frames_that_are_not_computed_again_have_the_same_bits(networks):
    target = Target(width=16, height=16, num_frames=81)
    image = picture(16, 16)
    frames = conditioning.pad_in_time(conditioning.to_signed(image), 81)
    with torch.inference_mode():
        expected = networks.vae.encode(frames)
    assert torch.equal(encode(networks, image, target).y_BCTHW[:, 4:], expected)


def test_one_frame_has_only_its_own_mask(networks):
    condition = encode(networks, picture(48, 64), Target(width=64, height=48, num_frames=1))
    assert condition.y_BCTHW.shape == (1, 20, 1, 6, 8)
    assert (condition.y_BCTHW[:, :4] == 1).all()


def test_noise_comes_first_then_the_mask_then_the_latents():
    """The network is asked for 36 channels, and given the image's tokens."""
    asked = []

    def network(*inputs):
        asked.append(inputs)
        return inputs[0][:, :16]

    y = torch.cat([torch.ones(1, 4, 2, 2, 2), torch.full((1, 16, 2, 2, 2), 2.0)], dim=1)
    condition = conditioning.Condition(y, torch.full((1, 17, 48), 3.0))
    velocity = conditioning.velocity(network, torch.zeros(1, 512, 32), condition)
    velocity(torch.zeros(1, 16, 2, 2, 2), torch.tensor([1000.0]))
    latents, timestep, context, tokens = asked[0]
    assert latents[0, :, 0, 0, 0].tolist() == [0.0] * 16 + [1.0] * 4 + [2.0] * 16
    assert timestep.tolist() == [1000.0]
    assert context.shape == (1, 512, 32)
    assert (tokens == 3).all()


def test_clip_sees_the_image_as_it_came(networks, monkeypatch):
    """Before it is resized for the video; a crop is what both networks see."""
    seen = []
    monkeypatch.setattr(networks.image_encoder, "encode", lambda image: seen.append(image))
    image = picture(50, 101)
    encode(networks, image)
    encode(networks, image, Target(width=64, height=64, num_frames=1, crops=True))
    assert torch.allclose(seen[0], image.permute(2, 0, 1)[None] / 127.5 - 1, atol=1e-6)
    assert seen[1].shape == (1, 3, 64, 64)


def test_an_image_is_stretched_unless_it_is_to_be_cropped():
    """Left third red, the rest blue: a square crop of the middle has less of the red."""
    image = torch.zeros(30, 90, 3, dtype=torch.uint8)
    image[:, :30, 0], image[:, 30:, 2] = 255, 255
    signed = conditioning.to_signed(image)
    target = Target(width=48, height=48, num_frames=1)
    stretched = conditioning.first_frame(signed, target)
    cropped = conditioning.crop_to_fill(signed, target)
    assert stretched.shape == cropped.shape == (1, 3, 48, 48)
    assert (stretched[0, 0] > 0).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert (cropped[0, 0] > 0).float().mean().item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("image", "video", "box"),
    [
        ((1000, 1000), (480, 480), (0, 0, 1000, 1000)),
        ((1920, 1080), (832, 480), (24, 0, 1896, 1080)),
        ((1900, 1096), (832, 480), (0, 0, 1900, 1096)),  # 0.5768 against 0.5769: stretched
        ((1080, 1920), (480, 832), (0, 24, 1080, 1896)),
        ((601, 1001), (480, 480), (0, 200, 601, 801)),
        ((1003, 1000), (832, 480), (0, 211, 1003, 789)),  # of 578.65 rows, as LightX2V has them
        ((1, 100), (832, 480), (0, 49, 1, 50)),
    ],
)
def test_the_middle_is_kept(image, video, box):
    """Sizes are width and height, the box left, top, right and bottom."""
    rows, columns = conditioning.middle(image[1], image[0], aspect=video[1] / video[0])
    assert (columns.start, rows.start, columns.stop, rows.stop) == box


def test_what_is_too_fine_for_a_cropped_frame_becomes_grey():
    """It is antialiased: else stripes would appear that the image does not have."""
    image = torch.zeros(96, 160, 3, dtype=torch.uint8)
    image[:, ::2] = 255
    signed = conditioning.to_signed(image)
    target = Target(width=32, height=32, num_frames=1, crops=True)
    inside = (..., slice(4, -4), slice(4, -4))
    assert conditioning.crop_to_fill(signed, target)[inside].abs().max() < 0.05
    assert conditioning.first_frame(signed, target)[inside].abs().max() > 0.9


def test_a_frame_of_the_videos_size_is_not_resampled():
    signed = conditioning.to_signed(picture(48, 64))
    assert torch.allclose(conditioning.first_frame(signed, TARGET), signed, atol=1e-6)


def test_bicubic_is_torchs_without_antialiasing():
    """Halving takes the four neighbours at weights -3/32, 19/32, 19/32, -3/32, no wider filter."""
    row = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]).expand(1, 3, 2, 8)
    halved = conditioning.first_frame(row, Target(width=4, height=2, num_frames=1))
    assert halved[0, 0, 0].tolist() == pytest.approx([-3 / 32, 19 / 32, 0, 0])


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (481, 833)])
def test_images_of_odd_sizes_are_conditions_too(networks, size):
    for crops in (False, True):
        target = Target(width=64, height=48, num_frames=5, crops=crops)
        condition = encode(networks, picture(*size), target)
        assert condition.y_BCTHW.shape == (1, 20, 2, 6, 8)
        assert condition.y_BCTHW.isfinite().all()
        assert condition.image_tokens_BIG.isfinite().all()


def test_the_same_image_gives_the_same_bits(networks):
    first, second = (encode(networks, picture(70, 101)) for _ in range(2))
    assert torch.equal(first.y_BCTHW, second.y_BCTHW)
    assert torch.equal(first.image_tokens_BIG, second.image_tokens_BIG)


def test_levels_span_minus_one_to_one():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3)
    assert conditioning.to_signed(levels).flatten().tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(0, 4, 3, dtype=torch.uint8),
    ],
    ids=["float", "channels-first", "alpha", "grey", "empty"],
)
def test_what_is_no_rgb_image_is_refused(tensor):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], got"):
        conditioning.to_signed(tensor)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_frames": 8}, "4n\\+1"), ({"width": 60}, "width must be a positive multiple of 8")],
)
def test_a_target_without_latents_is_refused(networks, change, says):
    target = Target(**({"width": 64, "height": 48, "num_frames": 9} | change))
    with pytest.raises(ValueError, match=says):
        encode(networks, picture(48, 64), target)
