"""How the tiny models are trained: whole clips, loops that go on, networks that grow an image."""

import dataclasses

import pytest
import torch

from models import config, vae
from models.tiny import (
    autoencoder,
    clips,
    exam,
    loop,
    make,
    recipes,
    teacher,
    whole_clip,
    words,
    world,
)

FOUR = (1000, 750, 500, 250)
SMALL = recipes.Transformer(dim=32, ffn_dim=48, num_heads=2, num_layers=1)


@pytest.fixture(scope="module")
def autoencoder_made():
    return make.random_vae(config.TINY_VAE, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return words.encoder(0, tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@torch.no_grad()
def test_a_whole_clip_is_encoded_and_decoded_as_chunk_by_chunk(autoencoder_made, num_frames):
    network = autoencoder_made
    frames = torch.rand(2, 3, num_frames, 32, 32, generator=torch.Generator().manual_seed(1))
    offset, scale = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (network.config.latent_mean, network.config.latent_std)
    )
    mean, _ = whole_clip.encode(network, frames)
    latents = network.encode(frames)
    torch.testing.assert_close((mean - offset) / scale, latents, atol=1e-5, rtol=0)
    decoded = whole_clip.decode(network, mean).clamp(-1, 1)
    chunks = torch.cat(list(network.decode_chunks(latents)), dim=2)
    torch.testing.assert_close(decoded, chunks, atol=1e-4, rtol=0)


def test_normalised_latents_have_spread_one_when_sampled():
    torch.manual_seed(0)
    network = vae.WanVAE(recipes.load().autoencoder.sizes)
    autoencoder.start(network)
    fitted = autoencoder.normalised(network, 0, clips=16)
    scene = world.scenes()[3]
    latents = fitted.encode(world.draw([scene] * 4, loop.dice(0, 0)))
    assert latents.std() < 1.05  # means alone spread less than samples
    assert min(fitted.config.latent_std) > 0.5


def training(path, encoder, *, steps, with_images=False):
    """A few steps of a network of one block on random latents."""
    scenes = clips.drawn_scenes(6, 0, 0.3)
    made = torch.Generator().manual_seed(3)
    data = clips.Clips(
        scenes=scenes,
        latents=torch.randn(6, 16, 2, 4, 4, generator=made).bfloat16(),
        y=torch.randn(6, 20, 2, 4, 4, generator=made) if with_images else torch.zeros(0),
        tokens=torch.randn(6, 5, 48, generator=made) if with_images else torch.zeros(0),
    )
    recipe = dataclasses.replace(recipes.load().text_to_video, batch=4, warmup=2, steps=steps)
    network = teacher.new(SMALL.text_to_video, 0)
    if with_images:
        network = teacher.for_images(network, SMALL.image_to_video, 0)
    contexts = words.Contexts(encoder, scenes)
    trained = teacher.train(
        network,
        recipe,
        0,
        data=data,
        contexts=contexts,
        path=path,
        say=lambda line: None,
        name="teacher",
    )
    return trained.state_dict(), network.state_dict()


class Interrupted(Exception):
    pass


def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, encoder, monkeypatch):
    straight = training(tmp_path / "straight.pt", encoder, steps=6)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise Interrupted
        return flow_loss(*arguments)

    flow_loss = teacher.flow_loss
    monkeypatch.setattr(teacher, "flow_loss", stop)
    with pytest.raises(Interrupted):
        training(tmp_path / "stopped.pt", encoder, steps=6)
    resumed = training(tmp_path / "stopped.pt", encoder, steps=6)
    assert len(calls) == 4 + 3
    for one, other in zip(straight, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_image_to_video_trains_as_well(tmp_path, encoder):
    _, trained = training(tmp_path / "i2v.pt", encoder, steps=2, with_images=True)
    assert trained["patch_embedding.weight"][:, 16:].abs().max() > 0


def test_every_weight_has_one_optimizer():
    network = teacher.new(SMALL.text_to_video, 0)
    pair = teacher.optimizers(network, recipes.load().text_to_video)
    held = [
        id(weight) for each in pair for group in each.param_groups for weight in group["params"]
    ]
    assert sorted(held) == sorted(id(weight) for weight in network.parameters())


@torch.no_grad()
def test_a_network_taught_images_begins_as_the_one_without():
    base = teacher.new(SMALL.text_to_video, 0)
    torch.nn.init.normal_(base.head.head.weight)
    grown = teacher.for_images(base, SMALL.image_to_video, 1)
    latents, y = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 20, 2, 4, 4)
    times, context = torch.tensor([900.0, 100.0]), torch.randn(2, words.TEXT_LEN, 64)
    expected = base(latents, times, context)
    seen = grown(torch.cat([latents, y], dim=1), times, context, torch.randn(2, 17, 48))
    torch.testing.assert_close(seen, expected)


def test_held_back_scenes_are_asked_with_every_factor_said(encoder, autoencoder_made):
    asked = exam.paper(encoder, autoencoder_made, count=5, seed=0)
    assert all(scene.is_held_back for scene in asked.scenes)
    expected = encoder.encode(world.prompt(asked.scenes[2]))
    assert torch.equal(asked.context_BSD[2:3], expected)


def test_guidance_asks_twice_a_step_and_none_once(encoder, autoencoder_made):
    asked = exam.paper(encoder, autoencoder_made, count=3, seed=0)
    network = teacher.new(SMALL.text_to_video, 0)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    exam.answer(network, asked, exam.Sampler(steps=FOUR))
    assert len(calls) == 4
    exam.answer(network, asked, exam.Sampler(steps=FOUR, guidance=2.0))
    assert len(calls) == 12


def test_two_sets_are_as_far_apart_as_they_differ():
    some = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    assert exam.distance(some, some) == 0
    assert exam.distance(some, 3 * some) > 5 * exam.distance(some, some + 0.1)


def test_the_recipe_that_ships_is_complete():
    recipe = recipes.load()
    last = sum(phase.steps for phase in recipe.autoencoder.phases) - 1
    phase, place = recipe.autoencoder.phase_at(last)
    assert (phase, place) == (recipe.autoencoder.phases[-1], phase.steps - 1)
    with pytest.raises(IndexError):
        recipe.autoencoder.phase_at(last + 1)
