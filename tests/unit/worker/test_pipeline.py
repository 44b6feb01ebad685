"""From a spec to frames: in order, interruptible, and the same for a seed whatever came before."""

import dataclasses
import functools
import threading
from concurrent.futures import Future

import hypothesis
import pytest
import torch
from hypothesis import strategies

from models import memory, sampling
from worker import errors, pipeline, resident, stopwatch


@pytest.fixture(scope="module")
def render(model, cpu):
    """Latents and chunks of frames of a spec; `reached` hears of the progress."""

    def run(spec, *, reached=lambda *_: None):
        timings = stopwatch.Timings()
        latents = pipeline.make_latents(spec, model, device=cpu, timings=timings, reached=reached)
        return latents, list(pipeline.decode(latents, model, timings=timings, reached=reached))

    return run


@pytest.fixture(scope="module")
def latents_hash(model, cpu):
    def run(spec):
        latents = pipeline.make_latents(
            spec,
            model,
            device=cpu,
            timings=stopwatch.Timings(),
            reached=lambda *_: None,
        )
        return pipeline.latents_sha256(latents)

    return run


def test_stages_follow_in_order_and_tell_how_far_they_are(render, spec):
    places = []
    render(spec(num_frames=9), reached=lambda *place: places.append(place))
    assert places == [
        ("text", 0, 1),
        *(("denoise", step, 4) for step in range(4)),
        *(("decode", step, 3) for step in range(3)),
    ]


def test_noise_is_drawn_while_the_text_is_encoded(render, spec, model, monkeypatch):
    """And not after it, when a GPU would wait for it."""
    latents, _ = render(spec())
    drawn, draw, encode = threading.Event(), sampling.initial_noise, model.encode_text

    def initial_noise(*arguments):
        found = draw(*arguments)
        drawn.set()
        return found

    def encode_text(prompt):
        assert drawn.wait(20)
        return encode(prompt)

    monkeypatch.setattr(sampling, "initial_noise", initial_noise)
    monkeypatch.setattr(model, "encode_text", encode_text)
    again, _ = render(spec())
    assert torch.equal(again, latents)


@pytest.mark.parametrize("last", [("text", 0, 1), ("denoise", 2, 4), ("decode", 1, 2)])
def test_what_is_raised_while_reporting_ends_the_render_there(render, spec, last):
    places = []

    def reached(*place):
        places.append(place)
        if place == last:
            raise errors.AttemptCancelled

    with pytest.raises(errors.AttemptCancelled):
        render(spec(), reached=reached)
    assert places[-1] == last


def test_decoding_in_tiles_tells_of_each_and_can_be_ended_there(model, cpu):
    """All tiles are decoded before the first frames come."""
    key = dataclasses.replace(model.key, mode=memory.Mode(vae_tiles=True))
    tiled = resident.ResidentModel(
        key,
        files=model.files,
        networks=model.networks,
        device=cpu.torch_device,
        hashes=Future(),
    )
    latents = torch.randn(1, 16, 2, 2, 80, generator=torch.Generator().manual_seed(0))
    places = []

    def reached(*place, most=None):
        places.append(place)
        if len(places) == most:
            raise errors.AttemptCancelled

    timings = stopwatch.Timings()
    chunks = list(pipeline.decode(latents, tiled, timings=timings, reached=reached))
    assert [chunk.shape[2] for chunk in chunks] == [640, 640]
    assert places == [*[("decode", 0, 2)] * (1 + 3), ("decode", 1, 2)]
    places.clear()
    ending = functools.partial(reached, most=3)
    with pytest.raises(errors.AttemptCancelled):
        list(pipeline.decode(latents, tiled, timings=timings, reached=ending))
    assert len(places) == 3


@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 16, 16), (5, 16, 32), (9, 48, 16)])
def test_frames_have_the_count_size_and_type_that_the_encoder_takes(
    render, spec, num_frames, height, width
):
    _, chunks = render(spec(num_frames=num_frames, height=height, width=width))
    frames = torch.cat(chunks)
    assert frames.shape == (num_frames, height, width, 3)
    assert frames.dtype == torch.uint8
    assert all(chunk.is_contiguous() for chunk in chunks)


def test_every_stage_has_its_seconds(model, cpu, spec):
    timings = stopwatch.Timings()
    job = spec(prompt="not encoded before")
    latents = pipeline.make_latents(
        job, model, device=cpu, timings=timings, reached=lambda *_: None
    )
    list(pipeline.decode(latents, model, timings=timings, reached=lambda *_: None))
    assert set(timings.seconds) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in timings.seconds.values())


def test_what_needs_no_device_does_not_wait_for_it():
    """It works for the next job by then."""
    waited = []
    timings = stopwatch.Timings(lambda: waited.append(stage))
    for stage in ("denoise", "mux"):
        with timings.stage(stage):
            pass
    with timings.stage("decode", waits=False):
        pass
    assert waited == ["denoise"]


def test_a_stage_that_raises_has_its_seconds_too(cpu):
    timings = stopwatch.Timings()
    with pytest.raises(errors.AttemptCancelled), timings.stage("denoise"):
        raise errors.AttemptCancelled
    assert "denoise" in timings.seconds


@pytest.mark.parametrize("step_rule", ["euler", "renoise"])
def test_a_seed_decides_the_latents(latents_hash, spec, step_rule):
    first = latents_hash(spec(seed=1, step_rule=step_rule))
    assert latents_hash(spec(seed=1, step_rule=step_rule)) == first
    assert latents_hash(spec(seed=2, step_rule=step_rule)) != first


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue square"},
        {"step_rule": "renoise"},
        {"sample_shift": 3.0},
        {"denoising_step_list": [1000, 500]},
    ],
)
def test_what_the_job_asks_for_changes_the_latents(latents_hash, spec, change):
    assert latents_hash(spec(**change)) != latents_hash(spec())


def test_the_rate_of_frames_changes_no_latents(latents_hash, spec):
    assert latents_hash(spec(fps=8)) == latents_hash(spec(fps=24))


jobs = strategies.fixed_dictionaries(
    {
        "prompt": strategies.sampled_from(["a", "two words", "ein längerer Satz"]),
        "seed": strategies.integers(0, 3),
        "width": strategies.sampled_from([16, 32]),
        "num_frames": strategies.sampled_from([1, 5]),
        "step_rule": strategies.sampled_from(["euler", "renoise"]),
        "denoising_step_list": strategies.just([1000, 500]),
    }
)


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(before=strategies.lists(jobs, min_size=1, max_size=2), job=jobs)
def test_a_render_is_independent_of_what_was_rendered_before(render, spec, before, job):
    alone, alone_frames = render(spec(**job))
    for other in before:
        render(spec(**other))
    again, again_frames = render(spec(**job))
    assert torch.equal(alone, again)
    assert torch.equal(torch.cat(alone_frames), torch.cat(again_frames))


def test_a_cancelled_render_leaves_nothing_to_the_next(render, spec):
    alone, frames = render(spec())

    def stop_in_decode(stage, step, _steps):
        if (stage, step) == ("decode", 1):
            raise errors.AttemptCancelled

    with pytest.raises(errors.AttemptCancelled):
        render(spec(seed=99), reached=stop_in_decode)
    again, again_frames = render(spec())
    assert torch.equal(alone, again)
    assert torch.equal(torch.cat(frames), torch.cat(again_frames))


def test_pixels_are_rounded_to_the_nearest_and_kept_in_range():
    values = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.5, 0.999, 1.0, 1.5])
    frames = pipeline.to_uint8(values.view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1))
    # 127.5 goes to the even neighbour, as IEEE rounding does.
    assert frames[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255, 255]


def test_every_level_survives_the_way_to_pixels():
    levels = torch.arange(256)
    scaled = (levels / 127.5 - 1).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    assert pipeline.to_uint8(scaled)[0, :, :, 2].flatten().equal(levels.to(torch.uint8))


def test_frames_are_rows_of_rgb_pixels():
    planes = torch.stack([torch.full((1, 2, 4), value) for value in (1.0, 0.0, -1.0)])
    frames = pipeline.to_uint8(planes.unsqueeze(0))
    assert frames.shape == (1, 2, 4, 3)
    assert frames[0, 1, 2].tolist() == [255, 128, 0]


def test_frames_that_are_not_numbers_are_refused(model, networks, render, spec, monkeypatch):
    """They would be black."""
    monkeypatch.setattr(networks.vae.conv2.bias, "data", networks.vae.conv2.bias * float("nan"))
    with pytest.raises(errors.NotFinite, match="NaN in the frames, decoded in float32"):
        render(spec())


@pytest.fixture
def device_beside(monkeypatch):
    """As on a GPU, frames are said to be under way when they have been asked for."""
    monkeypatch.setattr(pipeline.FramesUnderWay, "is_behind", True)


def test_a_device_is_asked_for_more_before_it_is_waited_for(
    model, render, spec, device_beside, monkeypatch
):
    told, decode_chunks = [], model.decode_chunks
    arrived = pipeline.FramesUnderWay.arrived

    def asked(*arguments, **options):
        for number, frames in enumerate(decode_chunks(*arguments, **options)):
            told.append(f"asked for {number}")
            yield frames

    def waited(frames):
        told.append("waited")
        return arrived(frames)

    monkeypatch.setattr(model, "decode_chunks", asked)
    monkeypatch.setattr(pipeline.FramesUnderWay, "arrived", waited)
    render(spec(num_frames=9))
    assert told == ["asked for 0", "asked for 1", "waited", "asked for 2", "waited", "waited"]


def test_frames_of_a_device_that_works_beside_are_the_same_in_the_same_order(
    render, spec, monkeypatch
):
    _, one_by_one = render(spec(num_frames=13))
    monkeypatch.setattr(pipeline.FramesUnderWay, "is_behind", True)
    _, beside = render(spec(num_frames=13))
    assert [len(chunk) for chunk in beside] == [len(chunk) for chunk in one_by_one]
    assert torch.equal(torch.cat(beside), torch.cat(one_by_one))


def test_frames_that_wait_for_ffmpeg_hold_no_memory_of_the_way_to_the_host(device_beside):
    under_way = pipeline.FramesUnderWay(torch.zeros(1, 3, 1, 2, 2))
    assert under_way.arrived().data_ptr() != under_way._frames_THWC.data_ptr()


def test_the_last_frames_of_a_device_beside_are_looked_at_too(
    model, render, spec, device_beside, monkeypatch
):
    decode_chunks = model.decode_chunks

    def broken_at_the_end(latents, **options):
        *good, last = decode_chunks(latents, **options)
        yield from (*good, last * float("nan"))

    monkeypatch.setattr(model, "decode_chunks", broken_at_the_end)
    with pytest.raises(errors.NotFinite, match="NaN in the frames"):
        render(spec(num_frames=9))


def test_frames_of_a_device_beside_that_nobody_wants_are_waited_for(
    render, spec, device_beside, monkeypatch
):
    """Else a fault of theirs would be the next job's."""
    waited = []
    monkeypatch.setattr(pipeline.FramesUnderWay, "wait", lambda frames: waited.append(frames))

    def reached(stage, step, _steps):
        if (stage, step) == ("decode", 1):
            raise errors.AttemptCancelled

    with pytest.raises(errors.AttemptCancelled):
        render(spec(num_frames=9), reached=reached)
    assert len(waited) == 1


def test_latents_that_are_not_finite_are_refused(model, networks, cpu, spec, monkeypatch):
    broken = networks.transformer.head.head.bias.clone()
    broken[0] = float("nan")
    monkeypatch.setattr(networks.transformer.head.head.bias, "data", broken)
    with pytest.raises(errors.NotFinite, match=r"torch\.float32"):
        pipeline.make_latents(
            spec(),
            model,
            device=cpu,
            timings=stopwatch.Timings(),
            reached=lambda *_: None,
        )


def test_a_spec_that_the_networks_cannot_render_is_the_jobs_own_fault(model, cpu, spec):
    """Never let in by presets, but a model may have other strides."""
    job = spec()
    odd = job.look.model_copy(update={"num_frames": 6})
    with pytest.raises(errors.SpecUnusable, match="num_frames"):
        pipeline.make_latents(
            job.model_copy(update={"look": odd}),
            model,
            device=cpu,
            timings=stopwatch.Timings(),
            reached=lambda *_: None,
        )
