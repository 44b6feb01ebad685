"""Every shipped preset renders with tiny weights that lie where its users' weights lie.

Both layouts of a model folder give the same latents, bit for bit: it is the same model.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies
from structlog.testing import capture_logs

from jobs import looks, presets
from models import (
    config,
    image_encoder,
    layout,
    lora,
    lora_keys,
    quantization,
    quantized_files,
    text_encoder,
    vae,
)
from models.tiny import folders, make
from worker import components, errors, pipeline, resident, room, stopwatch, wanted

NATIVE = "diffusion_pytorch_model.safetensors"
NAMES = [preset.name for preset in presets.available() if isinstance(preset, presets.Preset)]
EXPERTS = ("high_noise_model", "low_noise_model")
COLOURS = {"white": (200, 200, 200), "blue": (20, 60, 240)}


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory):
    """A tiny model per task, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    return {task: make.make(folder / task, task=layout.TASKS[task]) for task in ("t2v", "i2v")}


class Shelf:
    """A models folder, filled with what one look asks for."""

    def __init__(self, folder: Path, tiny: Path, look: looks.Look) -> None:
        self.folder, self.tiny, self.look = folder, tiny, look
        self.root = folder / look.model_path
        self.has_two = look.boundary_step_index is not None

    def fill(self) -> None:
        shutil.copytree(self.tiny, self.root)
        distilled = self.root / "distill_models" / "distill_model.safetensors"
        if self.has_two:
            self._make_two()
        elif self.look.transformer is not None:
            self._put(distilled, self.folder / self.look.transformer)
            shutil.rmtree(self.root / "distill_models", ignore_errors=True)
        elif self.look.quantization is not None:
            self._put(distilled, self.root / f"distill_{self.look.quantization}")
            shutil.rmtree(distilled.parent)
        for use in self.look.loras:
            if self.has_two:
                self._extract(self.folder / use.path)
            else:
                self._copy(self.tiny / folders.LORA_FILE, self.folder / use.path)

    def _extract(self, path: Path) -> None:
        """A LoRA that makes one expert of the other: it has all of their keys."""
        high, low = (safetensors.torch.load_file(self.root / name / NATIVE) for name in EXPERTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(lora.extract(high, low, 4, smallest_pair=1_000), path)

    def _make_two(self) -> None:
        """As Wan2.2 is laid out; an image-to-video one has no image encoder."""
        values = json.loads((self.root / "config.json").read_text())
        is_i2v = self.look.task == "i2v"
        sizes = config.TINY
        if is_i2v:
            sizes = config.TransformerConfig(**{**vars(config.TINY), "in_dim": 36})
            (self.root / layout.IMAGE_ENCODER_FILE).unlink()
            (self.root / "clip_config.json").unlink()
        for seed, name in enumerate(EXPERTS):
            dit = make.random_transformer(sizes, torch.Generator().manual_seed(seed))
            folder = self.root / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(values))
            safetensors.torch.save_file(dit.state_dict(), folder / NATIVE)
        for name in ("config.json", NATIVE):
            (self.root / name).unlink()
        shutil.rmtree(self.root / "distill_models")
        asked = (self.look.high_noise_transformer, self.look.low_noise_transformer)
        for name, path in zip(EXPERTS, asked, strict=True):
            if path is not None and (self.folder / path) != self.root / name:
                self._put(self.root / name / NATIVE, self.folder / path)

    def _put(self, source: Path, target: Path) -> None:
        """At a path of the preset's: a file, or a folder with one; quantized if it says so."""
        if target.suffix != ".safetensors":
            target = target / "distill_model.safetensors"
        scheme = self.look.quantization
        if scheme is None:
            self._copy(source, target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        files = layout.find(self.tiny, transformer_file=source)
        quantized_files.write(files, target, quantization.Scheme(scheme))

    def _copy(self, source: Path, target: Path) -> None:
        if source != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def small(look: looks.Look) -> looks.Look:
    return look.with_changes({"width": 32, "height": 32, "num_frames": 5, "size_rule": "fixed"})


def options_of(cpu, reached=lambda *_: None):
    return {"timings": stopwatch.Timings(), "reached": reached}


def latents_of(look, warm, cpu, *, colour="white", **options):
    spec = looks.RenderSpec(
        look=look,
        prompt="a red circle",
        negative_prompt=None,
        seed=3,
        image_key=f"inputs/{colour}" if look.needs_image else None,
    )
    image_HWC = torch.tensor(COLOURS[colour], dtype=torch.uint8).expand(40, 60, 3)
    model = warm.model_for(look)
    return pipeline.make_latents(
        spec, model, device=cpu, image=lambda: image_HWC, **options_of(cpu, **options)
    )


def render(look, models_dir, home, cpu):
    warm = components.Components(models_dir=models_dir, home=home, device=cpu)
    latents = latents_of(look, warm, cpu)
    return latents, torch.cat(
        list(pipeline.decode(latents, warm.model_for(look), **options_of(cpu)))
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_preset_renders_the_same_from_either_layout(
    name, tiny_of, to_diffusers, tmp_path, cpu
):
    look = small(presets.load(name).look)
    shelf = Shelf(tmp_path / "models", tiny_of[look.task], look)
    shelf.fill()
    latents, frames = render(look, shelf.folder, tmp_path / "home", cpu)
    assert frames.shape == (5, 32, 32, 3)
    assert 0.1 < latents.std() < 10
    assert frames.float().std() > 5
    to_diffusers(shelf.root)
    assert layout.find(shelf.root).layout is layout.Layout.DIFFUSERS
    again, _ = render(look, shelf.folder, tmp_path / "home", cpu)
    assert torch.equal(again, latents)


@pytest.mark.parametrize("name", ["wan_moe_i2v_distill_with_lora", "wan_moe_i2v_distill_quant"])
def test_a_lora_of_wan21_renders_on_wan22_without_its_image_encoder(name, tiny_of, tmp_path, cpu):
    """From the preset or a row, merged or beside 8-bit weights; the count is told once."""
    look = small(presets.load(name).look)
    shelf = Shelf(tmp_path / "models", tiny_of["i2v"], look)
    shelf.fill()
    style = safetensors.torch.load_file(shelf.tiny / folders.LORA_FILE)
    for_images = lora_keys.for_images(style)
    assert 0 < len(for_images) < len(style)
    stripped = {key: style[key] for key in style.keys() - set(for_images)}
    safetensors.torch.save_file(style, shelf.folder / "wan21.safetensors")
    safetensors.torch.save_file(stripped, shelf.folder / "stripped.safetensors")
    warm = components.Components(models_dir=shelf.folder, home=tmp_path / "home", device=cpu)
    latents = latents_of(look, warm, cpu)
    for use in look.loras[1:]:
        path = shelf.folder / use.path
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(tensors | {key: style[key] for key in for_images}, path)
    loras = [use.model_dump() for use in look.loras]
    assert torch.equal(latents_of(look, warm, cpu), latents)
    with capture_logs() as logs:
        found = {
            file: latents_of(
                look.with_changes({"loras": [*loras, {"path": f"{file}.safetensors"}]}), warm, cpu
            )
            for file in ("wan21", "stripped", "wan21")
        }
    assert torch.equal(found["wan21"], found["stripped"])
    assert not torch.equal(found["wan21"], latents)
    assert torch.equal(latents_of(look, warm, cpu), latents)
    told = [line for line in logs if line["event"] == "lora.keys_passed_over"]
    row = [line for line in told if line["path"] == "wan21.safetensors"]
    assert [line["keys"] for line in row] == [len(for_images)]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_diffusers_folder_may_be_distilled_as_a_whole(task, tiny_of, to_diffusers, tmp_path, cpu):
    """The complete model in transformer/, and nothing beside it."""
    look = small(presets.load(f"wan_{task}_distill_4step_cfg").look)
    shelf = Shelf(tmp_path / "models", tiny_of[task], look)
    shelf.fill()
    latents, _ = render(look, shelf.folder, tmp_path / "home", cpu)
    distilled = shelf.root / "distill_models" / "distill_model.safetensors"
    distilled.replace(shelf.root / NATIVE)
    distilled.parent.rmdir()
    to_diffusers(shelf.root)
    again, _ = render(look, shelf.folder, tmp_path / "home", cpu)
    assert torch.equal(again, latents)


def test_a_pair_of_complete_models_may_lie_in_a_diffusers_folder(
    tiny_of, to_diffusers, tmp_path, cpu
):
    look = small(presets.load("wan_moe_t2v_distill_lora").look)
    look = look.with_changes({"loras": [], "base": "distilled"})
    shelf = Shelf(tmp_path / "models", tiny_of["t2v"], look)
    shelf.fill()
    for name in EXPERTS:  # the two change places in distill_models
        target = shelf.root / "distill_models" / EXPERTS[name == EXPERTS[0]]
        shutil.copytree(shelf.root / name, target)
    latents, _ = render(look, shelf.folder, tmp_path / "home", cpu)
    plain, _ = render(look.with_changes({"base": "original"}), shelf.folder, tmp_path / "home", cpu)
    to_diffusers(shelf.root)
    again, _ = render(look, shelf.folder, tmp_path / "home", cpu)
    assert torch.equal(again, latents)
    assert not torch.equal(again, plain)


def test_the_family_is_there():
    """The seed's four files, by its names."""
    for task in ("t2v", "i2v"):
        for end in ("", "_lora"):
            assert f"wan_{task}_distill_4step_cfg{end}" in NAMES


# Nothing of a job is left for the next one.

PAIR = "wan_moe_t2v_distill_lora"
PAIR_ROOT = presets.load(PAIR).look.model_path
PAIR_LORAS = [use.model_dump() for use in presets.load(PAIR).look.loras]
WIDE = {"width": 48, "num_frames": 9}
WAYS = (
    ("tiny", {}),
    ("tiny_lora", {}),
    ("tiny", {"offload": "block", "denoising_step_list": [1000, 500]}),
    ("tiny_lora", {"offload": "model", "vae_tiling": True}),
    ("tiny", {"loras": [{"path": "tiny/loras/distill_lora.safetensors", "strength": -0.7}]}),
    ("tiny_i2v", {}),
    ("tiny_i2v", WIDE),
    ("tiny_i2v_lora", {"step_rule": "renoise", "sample_shift": 3.0}),
    (PAIR, {}),
    (PAIR, {"loras": PAIR_LORAS[1:], "boundary_step_index": 3}),
    (PAIR, {"loras": [], **WIDE}),
)
UNFIT = ("tiny", {"loras": [{"path": "tiny_i2v/loras/distill_lora.safetensors"}]})
"""Made for image-to-video: refused by the worker."""


@pytest.fixture(scope="module")
def shelf(tiny_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(tiny_of["t2v"], folder / "tiny")
    shutil.copytree(tiny_of["i2v"], folder / "tiny_i2v")
    Shelf(folder, tiny_of["t2v"], presets.load(PAIR).look).fill()
    return folder


def look_of(way):
    name, changes = way
    return small(presets.load(name).look).with_changes(changes)


@pytest.fixture(scope="module")
def alone(shelf, tmp_path_factory, cpu):
    """Hash of the latents of each way and image, by a worker that has rendered nothing else."""
    home, found = tmp_path_factory.mktemp("home"), {}
    for number, way in enumerate(WAYS):
        look = look_of(way)
        for colour in COLOURS if look.needs_image else ("white",):
            warm = components.Components(models_dir=shelf, home=home, device=cpu)
            latents = latents_of(look, warm, cpu, colour=colour)
            found[number, colour] = pipeline.latents_sha256(latents)
    # The complete model and the base with its LoRA are one, wherever their weights wait.
    assert len(set(found.values())) == len(found) - 2
    return found


class Stopped(Exception):
    """A job is cancelled."""


def stopping_at(step):
    def reached(stage, at, _steps):
        if (stage, at) == ("denoise", step):
            raise Stopped

    return reached


ENDS = ("to its end", "stopped", "refused")
JOBS = strategies.tuples(
    strategies.integers(0, len(WAYS) - 1),
    strategies.sampled_from(list(COLOURS)),
    strategies.sampled_from(ENDS[:1] * 4 + ENDS[1:]),
)


def each_after_each(*ways, colours=("white",)):
    """The shortest row of jobs in which each of these comes once after each, itself included."""
    kinds = [(way, colour, ENDS[0]) for way in ways for colour in colours]
    row = []
    for number, kind in enumerate(kinds):
        row += [kind, *(each for later in kinds[number + 1 :] for each in (kind, later))]
    return [*row, kinds[0]]


# What shares weights stays loaded from job to job, so there a leak would show.
@hypothesis.example(jobs=each_after_each(0, 4), has_room=True)
@hypothesis.example(jobs=each_after_each(5, 6, colours=COLOURS), has_room=True)
@hypothesis.example(jobs=each_after_each(8, 9, 10), has_room=True)
@hypothesis.example(jobs=[(4, "white", end) for end in ENDS[::-1]], has_room=True)
@hypothesis.example(jobs=[(0, "white", end) for end in ENDS[::-1]], has_room=True)
@hypothesis.example(
    jobs=[(4, "white", "to its end"), (0, "white", "refused"), (0, "white", "to its end")],
    has_room=True,
)
@hypothesis.settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    jobs=strategies.lists(JOBS, min_size=2, max_size=6), has_room=strategies.booleans()
)
def test_a_job_renders_the_same_alone_and_after_any_others(
    shelf, alone, tmp_path, cpu, jobs, has_room
):
    """Text and images of several sizes, LoRAs, pairs, step rules, memory modes; with and without
    eviction; and after jobs that were stopped amid their steps or whose LoRA was refused.
    """
    room_for_one = max(peak_of(look_of(way), shelf, cpu) for way in WAYS)
    warm = components.Components(
        models_dir=shelf,
        home=tmp_path,
        device=cpu,
        host_bytes=None if has_room else room_for_one,
    )
    for way, colour, ends in jobs:
        look = look_of(WAYS[way])
        if ends == "refused":
            with pytest.raises(errors.LoraUnfit, match="image-to-video"):
                warm.model_for(look_of(UNFIT))
        elif ends == "stopped":
            with pytest.raises(Stopped):
                latents_of(look, warm, cpu, colour=colour, reached=stopping_at(1))
        else:
            hashed = pipeline.latents_sha256(latents_of(look, warm, cpu, colour=colour))
            assert hashed == alone[way, colour if look.needs_image else "white"]
    assert warm.loads <= len(jobs)


def test_an_image_is_encoded_once_for_all_jobs_that_begin_with_it(
    shelf, tmp_path, cpu, monkeypatch
):
    """By both networks; another LoRA or list of steps changes nothing of it, another size does."""
    encoded = Counter()

    def count(network):
        real = network.encode

        def encode(self, *arguments, **options):
            encoded[network.__name__] += 1
            return real(self, *arguments, **options)

        monkeypatch.setattr(network, "encode", encode)

    count(image_encoder.ImageEncoder)
    count(vae.WanVAE)
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of(("tiny_i2v", {"base": "original", "denoising_step_list": [1000]}))
    loras = [{"path": "tiny_i2v/loras/distill_lora.safetensors"}]
    for each in (look, look.with_changes({"loras": loras})):
        for colour in [*COLOURS] * 3:
            latents_of(each, warm, cpu, colour=colour)
    assert encoded == {"ImageEncoder": len(COLOURS), "WanVAE": len(COLOURS)}
    latents_of(look.with_changes(WIDE), warm, cpu)
    assert set(encoded.values()) == {len(COLOURS) + 1}


def test_a_prompt_is_encoded_once_for_all_its_seeds_while_it_is_one_of_the_last(
    shelf, tmp_path, cpu, monkeypatch
):
    prompts = []
    encode = text_encoder.TextEncoder.encode

    def count(self, prompt):
        prompts.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(text_encoder.TextEncoder, "encode", count)
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    first = warm.model_for(look_of(("tiny", {}))).encode_text("a")
    prompts.clear()
    monkeypatch.setattr(resident, "MAX_CONTEXT_BYTES", 2 * first.nbytes)
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    model = warm.model_for(look_of(("tiny", {})))
    assert torch.equal(model.encode_text("a"), first)
    assert torch.equal(model.encode_text("a"), first)
    for prompt in ("b", "a", "c", "a", "b"):
        model.encode_text(prompt)
    assert prompts == ["a", "b", "c", "b"]
    assert torch.equal(model.encode_text("a"), first)


def test_the_last_image_is_kept_however_large_it_is(shelf, tmp_path, cpu, monkeypatch):
    monkeypatch.setattr(resident, "MAX_CONDITION_BYTES", 1)
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of(("tiny_i2v", {"base": "original", "denoising_step_list": [1000]}))
    for colour in COLOURS:
        latents_of(look, warm, cpu, colour=colour)
    model = warm.model_for(look)
    assert [model.knows_image(f"inputs/{colour}", look) for colour in COLOURS] == [False, True]


def test_what_is_forgotten_takes_no_room():
    recent = resident.Recent(2)
    for keys in ("ab", "cd"):
        for key in keys:
            recent.get(key, lambda: torch.zeros(1, dtype=torch.uint8))
        assert all(key in recent for key in keys)
        assert recent.forget()
    assert not recent.forget()


def test_texts_and_images_are_forgotten_together(shelf, tmp_path, cpu):
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of(("tiny_i2v", {"base": "original", "denoising_step_list": [1000]}))
    latents_of(look, warm, cpu)
    model = warm.model_for(look)
    assert model.knows_image("inputs/white", look)
    assert model.forget()
    assert not model.knows_image("inputs/white", look)
    assert not model.forget()


def test_an_image_is_cropped_where_its_look_says_so(shelf, tmp_path, cpu):
    """Wider than the video, with other colours at its sides than in its middle."""
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    image_HWC = torch.zeros(32, 96, 3, dtype=torch.uint8)
    image_HWC[:, 32:64] = 255
    found = []
    for rule in ("fixed", "area"):
        look = look_of(("tiny_i2v", {"size_rule": rule}))
        condition = warm.model_for(look).condition("inputs/striped", image_HWC, look)
        white = torch.full((32, 32, 3), 255, dtype=torch.uint8)
        all_white = warm.model_for(look).condition("inputs/white", white, look)
        found.append(torch.equal(condition.y_BCTHW, all_white.y_BCTHW))
    assert found == [True, False]


def test_one_expert_leaves_the_device_before_the_other_comes(shelf, tmp_path, cpu, monkeypatch):
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of((PAIR, {"loras": [], "offload": "model"}))
    model = warm.model_for(look)
    told, real = [], model._placement.using

    @contextlib.contextmanager
    def using(network):
        told.append(("comes", network))
        with real(network) as device:
            yield device
        told.append(("leaves", network))

    monkeypatch.setattr(model._placement, "using", using)
    denoiser = model.denoiser(torch.zeros(1), None, look)
    with denoiser:
        for step in range(look.num_steps):
            denoiser.select(step)
    high, low = model.networks.transformer, model.networks.low_noise_transformer
    assert told == [("comes", high), ("leaves", high), ("comes", low), ("leaves", low)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_lora_with_a_name_changes_that_expert_alone(number, shelf, tmp_path, cpu):
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of((PAIR, {"loras": []}))
    networks = warm.model_for(look).networks
    experts = (networks.transformer, networks.low_noise_transformer)
    before = [network.head.modulation.clone() for network in experts]
    warm.model_for(look.with_changes({"loras": [PAIR_LORAS[number]]}))
    changed = [
        not torch.equal(network.head.modulation, was)
        for network, was in zip(experts, before, strict=True)
    ]
    assert changed == [number == 0, number == 1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_replaced_lora_of_either_expert_is_not_taken_for_the_merged_one(
    number, shelf, tmp_path, cpu
):
    warm = components.Components(models_dir=shelf, home=tmp_path, device=cpu)
    look = look_of((PAIR, {}))
    model = warm.model_for(look)
    assert warm.lora_hashes(look, model)
    os.utime(shelf / PAIR_LORAS[number]["path"], (1, 1))
    assert warm.lora_hashes(look, model) is None


def peak_of(look, shelf, cpu):
    need = wanted.needed(look, wanted.find(look, shelf), wanted.mode_of(look), shelf)
    return room.share_of(need, cpu).host_peak
