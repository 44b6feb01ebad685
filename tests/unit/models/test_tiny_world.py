"""The tiny world: its clips, its prompts, and what is read from pixels."""

import itertools
import random

import pytest
import torch

from models.tiny import readout, words, world

SCENES = world.scenes()


def clip_of(scene, seed=0):
    return world.draw([scene], random.Random(seed))


def example(**factors):
    given = {
        "colour": "red",
        "shape": "circle",
        "direction": "right",
        "background": "dark",
        "speed": "quickly",
    }
    return world.Scene(**given | factors)


def test_every_seventh_scene_is_read_as_it_was_drawn():
    some = SCENES[::7]
    marks = readout.accuracy(readout.read(world.draw(some, random.Random(1))), some)
    assert set(marks.values()) == {1.0}


def test_a_prompt_says_all_factors_and_its_short_forms_say_less():
    assert world.prompt(example()) == "a red circle moves quickly right on a dark background"
    behind = example(speed=None, depth="behind", direction="left", background="light")
    texts = world.prompts(behind)
    assert texts[0] == "a red circle moves left behind a grey pillar on a light background"
    assert "a red circle moves to the left behind a grey pillar" in texts
    assert "a red circle moves right" in world.prompts(example())
    assert all("pillar" not in text for text in world.prompts(example()))


def test_held_back_scenes_share_every_pair_of_factors_with_trained_ones():
    trained = world.trained(SCENES)
    held_back = world.held_back(SCENES)
    assert len(trained) + len(held_back) == len(SCENES)
    assert 0.15 < len(held_back) / len(SCENES) < 0.25
    for first, second in itertools.combinations(("shape", "colour", "direction"), 2):
        pairs = {(getattr(scene, first), getattr(scene, second)) for scene in trained}
        assert pairs >= {(getattr(s, first), getattr(s, second)) for s in held_back}
    triples = {(scene.shape, scene.colour, scene.direction) for scene in trained}
    assert not triples & {(s.shape, s.colour, s.direction) for s in held_back}


def test_a_seed_draws_the_same_clip_and_another_seed_another():
    assert torch.equal(clip_of(example(), 3), clip_of(example(), 3))
    assert not torch.equal(clip_of(example(), 3), clip_of(example(), 4))


def test_some_frames_of_a_clip_are_those_of_the_whole_clip():
    scene = example(direction="up")
    some = world.draw([scene], random.Random(2), frames=slice(3, 8))
    assert torch.equal(some, clip_of(scene, 2)[:, :, 3:8])


def broken(clip, how):
    clip = clip.clone()
    background = clip[:, :, 0, 0, 0]
    if how == "vanishes":
        clip[:, :, 9] = background[:, :, None, None]
    elif how == "splits":
        clip[:, :, 9] = torch.maximum(clip[:, :, 0], clip[:, :, 16])
    elif how == "jumps":
        clip[:, :, 9] = clip[:, :, 0]
    elif how == "changes colour":
        clip[:, :, 9] = clip[:, [2, 1, 0], 9]
    elif how == "shrinks":
        small = torch.nn.functional.interpolate(clip[:, :, 9], scale_factor=0.6)
        clip[:, :, 9] = background[:, :, None, None]
        clip[:, :, 9, 10 : 10 + small.shape[2], 10 : 10 + small.shape[3]] = small
    return clip


@pytest.mark.parametrize("how", ["vanishes", "splits", "jumps", "changes colour", "shrinks"])
def test_one_bad_frame_makes_a_clip_inconsistent(how):
    clip = clip_of(example())
    assert readout.read(clip)[0].consistent
    assert not readout.read(broken(clip, how))[0].consistent


def test_noise_and_an_empty_picture_are_nothing():
    noise = torch.randn(1, 3, 17, 48, 48, generator=torch.Generator().manual_seed(0))
    empty = torch.full((1, 3, 17, 48, 48), -0.84)
    assert not any(reading.consistent for reading in readout.read(torch.cat([noise, empty])))


def test_depth_is_read_from_what_covers_what():
    for depth in world.DEPTHS:
        scene = example(speed=None, depth=depth)
        assert readout.read(clip_of(scene))[0].depth == depth


def test_movement_is_read_in_pixels_per_frame():
    for speed, pixels in world.SPEEDS.items():
        reading = readout.read(clip_of(example(speed=speed, direction="down")))[0]
        assert reading.pixels_per_frame == pytest.approx(pixels, rel=0.08)


def test_the_tokenizer_takes_any_text_and_knows_its_words_in_any_case(tmp_path):
    encoder = words.encoder(0, tmp_path / "tokenizer")

    def tokens(text):
        return encoder.tokenizer.convert_ids_to_tokens(encoder.tokenize(text)[0].tolist())

    assert tokens("A Red, circle!") == ["a", "red", "circle", "</s>"]
    assert tokens("一只 zebra moves") == ["<unk>", "<unk>", "moves", "</s>"]
    assert tokens("") == ["</s>"]
    assert encoder.encode("red " * 100).shape == (1, words.TEXT_LEN, words.sizes().dim)
