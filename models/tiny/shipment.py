"""The trained tiny models as folders that the renderer reads, and marks for them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models import (
    checkpoint,
    layout,
    lora_switcher,
    safetensors_files,
    transformer,
    transformer_files,
)
from models.tiny import apprentices, exam, folders, readout, shipped, words, workshop

NAMES = dict(zip((False, True), shipped.NAMES, strict=True))  # by whether with images
EXAM_CLIPS = 120
SHEET_CLIPS = 12
STUDENT_FILE = transformer_files.DISTILLED_FILES[0]


def write(shop: workshop.Workshop, folder: Path) -> None:
    """Both models, each complete: teacher, student, LoRA, autoencoder and encoders."""
    for with_images, name in NAMES.items():
        _write_one(shop, folder / name, with_images=with_images)
        shop.say(f"export  {folder / name}")


def _write_one(shop: workshop.Workshop, folder: Path, *, with_images: bool) -> None:
    write_base(shop, folder, with_images=with_images)
    made = {"student": STUDENT_FILE, "lora": folders.LORA_FILE}
    for name, relative in made.items():
        apprentice = apprentices.named(shop, workshop.named(name, with_images))
        trained = apprentices.train(shop, apprentice)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained, folder / relative)


def write_base(shop: workshop.Workshop, folder: Path, *, with_images: bool) -> None:
    """A complete model that is not distilled: teacher, autoencoder and encoders, in bf16."""
    shutil.rmtree(folder, ignore_errors=True)
    sizes = shop.recipe.transformer
    folders.write_transformer_config(
        folder, sizes.image_to_video if with_images else sizes.text_to_video
    )
    teacher = shop.teacher(with_images=with_images).state_dict()
    narrow = {
        name: tensor.to("cpu", transformer.parameter_dtype(name, torch.bfloat16)).contiguous()
        for name, tensor in teacher.items()
    }
    folders.save(narrow, folder / f"{layout.TRANSFORMER_STEM}.safetensors")
    folders.write_vae(folder, shop.autoencoder, dtype=torch.bfloat16)
    network = shop.text_encoder.network
    folders.write_text_encoder(folder, network, words.sizes(), dtype=torch.bfloat16)
    words.write_tokenizer(folder / layout.TOKENIZER_FOLDER)
    if with_images:
        folders.write_image_encoder(folder, shop.image_tower, dtype=torch.bfloat16)


def load(folder: Path, *, base: bool = False) -> checkpoint.Networks:
    """A shipped model in fp32 on the CPU; `base`: its teacher."""
    return checkpoint.load(layout.find(folder, base=base), device="cpu", dtype=torch.float32)


def sampler_of(file: Path) -> exam.Sampler:
    """What a student or LoRA of ours was distilled for, as its header says."""
    told: dict[str, Any] = safetensors_files.read_metadata(file)
    steps = tuple(json.loads(told["denoising_step_list"]))
    return exam.Sampler(steps=steps, step_rule=told["step_rule"])


def examine(shop: workshop.Workshop) -> None:
    """Mark what was exported; `exam.json`, and a contact sheet for each sampler."""
    marks = {}
    for name in NAMES.values():
        folder = shop.folder / "weights" / name
        rows = examine_one(folder, sheets=shop.folder / "sheets")
        marks[name] = rows
        shop.say(exam.table(rows))
    (shop.folder / "exam.json").write_text(json.dumps(marks, indent=2) + "\n", encoding="utf-8")


def examine_one(folder: Path, *, sheets: Path) -> Mapping[str, Mapping[str, float]]:
    """Marks of the teacher in fifty steps and in four, of the student, and of the LoRA.

    Each draws every clip twice, from other noise. Distances are from its second draw to the first
    of the teacher's fifty steps: the teacher's own is the floor.
    """
    base = load(folder, base=True)
    student = load(folder)
    tower = student.image_encoder if isinstance(student, checkpoint.ImageToVideoNetworks) else None
    asked = exam.paper(student.text_encoder, student.vae, count=EXAM_CLIPS, seed=11, tower=tower)
    again = exam.with_other_noise(asked, seed=12)
    rows: dict[str, dict[str, float]] = {}
    reference: tuple[Tensor, Tensor] | None = None

    def sit(
        name: str,
        network: transformer.WanTransformer,
        sampler: exam.Sampler,
    ) -> None:
        nonlocal reference
        draws = [exam.take(network, student.vae, paper, sampler) for paper in (asked, again)]
        (marks, frames, latents), (other_marks, other_frames, other_latents) = draws
        reference = reference or (frames, latents)
        rows[name] = {mark: (marks[mark] + other_marks[mark]) / 2 for mark in marks} | {
            "swd_pixels": exam.distance(other_frames, reference[0]),
            "swd_latents": exam.distance(other_latents, reference[1]),
            "diversity": exam.diversity(frames, other_frames),
        }
        if asked.condition is not None:
            rows[name]["first_frame"] = exam.first_frame(student.vae, latents, asked)
        save_sheet(frames[:SHEET_CLIPS], sheets / f"{folder.name} {name}.png")

    sit("teacher, 50 steps", base.transformer, exam.TEACHER)
    four = sampler_of(folder / STUDENT_FILE)
    sit("teacher, 4 steps", base.transformer, four)
    sit("student, 4 steps", student.transformer, four)
    choice = lora_switcher.Choice(path=folder / folders.LORA_FILE)
    lora_switcher.LoraSwitcher(base.transformer).apply([choice])
    sit("LoRA, 4 steps", base.transformer, sampler_of(choice.path))
    return rows


def save_sheet(frames_BCTHW: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(readout.grid(frames_BCTHW).numpy()).save(path)
