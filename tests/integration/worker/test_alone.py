"""`rushes render`: videos without queue, database and store, by one process or by several."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from jobs import cli, unqueued
from models import config, layout, sequence_parallel
from models.tiny import make
from worker import errors, pipeline

RENDER = [sys.executable, "-W", "ignore", "-m", "jobs", "render"]
TORCHRUN = [
    *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2", "--no-python"),
]
ROWS = [
    {"custom_id": "first", "prompt": "a red circle moves", "seed": 3, "image": "first.png"},
    {"prompt": "a blue square", "seed": 4, "image": "first.png"},
]
PRESET = {
    "model_cls": "wan2.1_distill",
    "task": "i2v",
    "model_path": "tiny_i2v",
    "denoising_step_list": [1000, 750, 500, 250],
    "sample_shift": 5,
    "resize_mode": "fixed_shape",
    "target_width": 48,
    "target_height": 32,
    "target_video_length": 9,
    "fps": 8,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A home with a model, a preset, prompts and their image; nothing else is there."""
    folder = tmp_path_factory.mktemp("alone")
    make.make(folder / "home/models/tiny_i2v", task=layout.TASKS["i2v"])
    (folder / "preset.json").write_text(json.dumps(PRESET))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pixels = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder


@pytest.fixture(scope="module")
def rushes(world):
    """`rushes("render", ...)` in this process."""

    def run(*arguments: str) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world)
            patch.setenv("RUSHES_HOME", str(world / "home"))
            result = CliRunner().invoke(cli.main, [*arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture(scope="module")
def alone(rushes):
    """What one process says."""
    result = rushes("render", "prompts.jsonl", "--preset", "preset.json", "--to", "alone")
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def together(world):
    """What two processes say that torchrun starts."""
    environment = {
        **os.environ,
        "RUSHES_HOME": str(world / "home"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [*TORCHRUN, *RENDER, "prompts.jsonl", "--preset", "preset.json", "--to", "together"]
    done = subprocess.run(
        command, cwd=world, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def frames(video: Path) -> np.ndarray:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-v", "error", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(shown, np.uint8).reshape(9, 32, 48, 3).astype(int)


def test_a_gpu_that_torch_does_not_see_is_told(rushes, tmp_path, monkeypatch):
    """Else the processor would take hours where a GPU takes seconds, without a word."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "0, GPU-1, NVIDIA H200, 143771"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    render = ("render", "prompts.jsonl", "--preset", "preset.json", "--to", str(tmp_path / "to"))
    told = rushes(*render).stderr
    assert "gpu.not_used" in told
    assert "NVIDIA H200" in told
    monkeypatch.setenv("RUSHES_DEVICE", "cpu")
    again = ("render", "prompts.jsonl", "--preset", "preset.json", "--to", str(tmp_path / "again"))
    assert "gpu.not_used" not in rushes(*again).stderr


def test_each_prompt_becomes_a_video_with_its_sidecar(world, alone):
    """And nothing else is left, neither in the folder nor of a database."""
    assert alone.splitlines() == ["alone/first.mp4", "alone/00001.mp4"]
    names = {path.name for path in (world / "alone").iterdir()}
    assert names == {"first.mp4", "first.json", "00001.mp4", "00001.json"}
    sidecar = json.loads((world / "alone/first.json").read_text())
    assert (sidecar["custom_id"], sidecar["seed"]) == ("first", 3)
    assert "devices_per_video" not in sidecar
    assert not (world / "home/rushes.db").exists()


def test_two_processes_make_the_same_videos(world, alone, together):
    """The image reaches both; the second one says nothing and leaves nothing."""
    assert together.splitlines() == ["together/first.mp4", "together/00001.mp4"]
    for name in ("first", "00001"):
        one, two = (frames(world / folder / f"{name}.mp4") for folder in ("alone", "together"))
        assert abs(one - two).max() <= 2, "more than rounding and its coding"
        sidecar = json.loads((world / f"together/{name}.json").read_text())
        assert sidecar["devices_per_video"] == 2
    assert one.std() > 10, "a video in which a difference would show"


def test_the_models_of_the_demo_need_no_preparation(world, rushes):
    (world / "one.txt").write_text("a red circle moves right\n")
    result = rushes("render", "one.txt", "--preset", "tiny", "--to", "demo")
    assert result.stdout == "demo/00000.mp4\n", result.stderr


def test_what_is_there_is_not_made_again(world, rushes, alone):
    """Whatever it shows: its sidecar is asked. A sidecar alone is what a crash has left."""
    shutil.copytree(world / "alone", world / "mine")
    first = world / "mine/first.mp4"
    first.write_bytes(b"mine")
    (world / "mine/00001.mp4").unlink()
    render = ("render", "prompts.jsonl", "--preset", "preset.json", "--to", "mine")
    result = rushes(*render)
    assert result.stdout == alone.replace("alone/", "mine/")
    said = [line for line in result.stderr.splitlines() if "mine/" in line or "rendering" in line]
    assert said == ["mine/first.mp4 is there already: passed over", "rendering 00001"]
    assert first.read_bytes() == b"mine"
    (world / "mine/00001.mp4").unlink()
    told = json.loads(rushes(*render, "-o", "json").stdout)["videos"]
    assert [video["status"] for video in told] == ["there", "rendered"]


def test_weights_that_were_replaced_between_two_videos_of_a_folder_are_told(
    world, rushes, alone, tmp_path
):
    render = ("render", "prompts.jsonl", "--preset", "preset.json", "--to", str(tmp_path))
    shutil.copytree(world / "alone", tmp_path, dirs_exist_ok=True)
    assert "note: " not in rushes(*render).stderr
    (tmp_path / "00001.mp4").unlink()
    tokenizer = world / "home/models/tiny_i2v/google/umt5-xxl/tokenizer.json"
    before = tokenizer.read_text()
    tokenizer.write_text(before + "\n")
    told = rushes(*render).stderr.splitlines()
    tokenizer.write_text(before)
    assert [line for line in told if line.startswith("note: ")] == [
        "note: tiny_i2v/google/umt5-xxl/tokenizer.json was replaced: "
        "not all of these videos were made with the same"
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "a cat"}, "was made from another prompt"),
        ({"negative_prompt": "blurred"}, "was made from another negative prompt"),
        ({"image": "other.png", "seed": 9}, "was made from another image, seed"),
        ({"width": 64, "fps": 9}, "was made from another look (width, fps)"),
    ],
)
def test_a_video_of_something_else_is_told_before_anything_is_made(
    world, rushes, alone, change, told
):
    Image.new("RGB", (60, 40)).save(world / "other.png")
    row = json.dumps(ROWS[0] | change)
    (world / "other.jsonl").write_text(f'{{"prompt": "x", "image": "first.png"}}\n{row}\n')
    before = {path: path.read_bytes() for path in (world / "alone").iterdir()}
    result = rushes("render", "other.jsonl", "--preset", "preset.json", "--to", "alone")
    assert result.exit_code == 2
    advice = "give another folder, or remove it"
    assert result.stderr.splitlines()[-1] == f"alone: first.mp4 is there and {told}: {advice}"
    assert {path: path.read_bytes() for path in (world / "alone").iterdir()} == before


@pytest.mark.parametrize("text", [None, "", "[]", '{"prompt": "a red circle moves"}'])
def test_a_video_of_which_nobody_knows_is_not_taken_for_ours(world, rushes, alone, tmp_path, text):
    shutil.copy(world / "alone/first.mp4", tmp_path / "first.mp4")
    if text is not None:
        (tmp_path / "first.json").write_text(text)
    result = rushes("render", "prompts.jsonl", "--preset", "preset.json", "--to", str(tmp_path))
    assert result.exit_code == 2
    assert "first.mp4 is there and has no sidecar that says what it was made" in result.stderr


def test_a_seed_that_nobody_gave_may_be_any(world, rushes, alone):
    """And how the model lay in memory may differ, as after running out of it."""
    rows = [{key: value for key, value in row.items() if key != "seed"} for row in ROWS]
    (world / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "small.json").write_text(json.dumps(PRESET | {"cpu_offload": True}))
    result = rushes("render", "drawn.jsonl", "--preset", "small.json", "--to", "alone")
    assert result.stdout == alone, result.stderr
    assert "rendering" not in result.stderr


def test_what_fails_leaves_nothing_half_made(world, rushes, monkeypatch):
    """And what was finished before it stays."""
    decode = pipeline.decode

    def decode_once(*arguments, **others):
        monkeypatch.setattr(pipeline, "decode", fail)
        return decode(*arguments, **others)

    def fail(*_, **__):
        raise errors.NotFinite("NaN")

    monkeypatch.setattr(pipeline, "decode", decode_once)
    result = rushes("render", "prompts.jsonl", "--preset", "preset.json", "--to", "half")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: NaN"
    assert {path.name for path in (world / "half").iterdir()} == {"first.mp4", "first.json"}


def test_an_image_that_was_changed_meanwhile_is_refused(world, rushes, monkeypatch):
    """It might ask for a video of another size than the one that was checked."""
    monkeypatch.setattr(unqueued.Orders, "read_image", changing(world, unqueued.Orders.read_image))
    result = rushes("render", "prompts.jsonl", "--preset", "preset.json", "--to", "changed")
    assert result.exit_code == 1
    assert "was changed since the prompts were read" in result.stderr
    assert not list((world / "changed").iterdir())


def changing(world, read_image):
    def read(orders, key):
        path = world / "first.png"
        original = path.read_bytes()
        Image.new("RGB", (60, 40)).save(path)
        try:
            return read_image(orders, key)
        finally:
            path.write_bytes(original)

    return read


def test_bad_lines_are_told_before_anything_is_made(world, rushes):
    (world / "bad.jsonl").write_text('{"prompt": "a cat"}\n{"promt": "x"}\n')
    result = rushes("render", "bad.jsonl", "--preset", "preset.json", "--to", "never")
    assert result.exit_code == 2
    assert "bad.jsonl:1: image is missing" in result.stderr
    assert 'bad.jsonl:2: unknown key "promt"' in result.stderr
    assert not (world / "never").exists()


@pytest.mark.parametrize(
    ("model_path", "told"),
    [("none", "docs/weights.md"), ("simulated/none", "`rushes up --devices sim:N`")],
)
def test_a_model_that_is_not_there_is_told_before_anything_is_made(world, rushes, model_path, told):
    (world / "other.json").write_text(json.dumps(PRESET | {"model_path": model_path}))
    result = rushes("render", "prompts.jsonl", "--preset", "other.json", "--to", "missing")
    assert (result.exit_code, told in result.stderr) == (1, True), result.stderr
    assert "rendering" not in result.stderr
    assert not (world / "missing").exists()


def test_processes_that_the_heads_cannot_be_shared_by_are_refused(world, monkeypatch):
    """Before the first step, and with numbers that would do."""
    tokens = sequence_parallel.SharedTokens.__new__(sequence_parallel.SharedTokens)
    tokens.num_processes = 3
    network = make.random_transformer(config.TINY, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="2 heads cannot be shared by 3 processes; 1, 2 could"):
        network.share(tokens)
    assert network.tokens.num_processes == 1
