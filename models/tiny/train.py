"""Train the tiny models: `python -m models.tiny.train FOLDER [--until STAGE]`.

    autoencoder     frames of the tiny world to latents and back
    clips           latents of many clips, encoded once
    teacher         text to video by flow matching, many steps with guidance
    teacher_i2v     the same network taught to start with a picture
    student, lora, student_i2v, lora_i2v      both in 4 steps without guidance
    export          weights/tiny and weights/tiny_i2v, as the renderer reads them
    exam            marks on held-back prompts, and contact sheets

It goes on where it was stopped. Everything is kept in FOLDER; a stage is made again when its file
is removed. One thread is best: it takes nearly half the processor time that two take.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from models.tiny import apprentices, recipes, shipment, workshop


def stages(shop: workshop.Workshop) -> dict[str, Callable[[], object]]:
    """What each stage does, in order; each begins with what the ones before it left."""
    return {
        "autoencoder": lambda: shop.autoencoder,
        "clips": lambda: (shop.clips(with_images=False), shop.clips(with_images=True)),
        "teacher": lambda: shop.teacher(with_images=False),
        "teacher_i2v": lambda: shop.teacher(with_images=True),
        "student": lambda: _apprentice(shop, "student"),
        "lora": lambda: _apprentice(shop, "lora"),
        "student_i2v": lambda: _apprentice(shop, "student_i2v"),
        "lora_i2v": lambda: _apprentice(shop, "lora_i2v"),
        "export": lambda: shipment.write(shop, shop.folder / "weights"),
        "exam": lambda: shipment.examine(shop),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `opened` reads."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=recipes.DEFAULT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda: minutes instead of hours")


def opened(parser: argparse.ArgumentParser, options: argparse.Namespace) -> workshop.Workshop:
    """The folder, with a recipe and a device; ends the program for a device that is not there."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    torch.set_num_threads(options.threads)
    began = time.monotonic()

    def say(line: str) -> None:
        sys.stdout.write(f"{(time.monotonic() - began) / 60:6.1f} min  {line}\n")
        sys.stdout.flush()

    return workshop.Workshop(options.folder, recipes.load(options.recipe), say, options.device)


def _apprentice(shop: workshop.Workshop, name: str) -> Path:
    return apprentices.train(shop, apprentices.named(shop, name))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.tiny.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--until", metavar="STAGE", help="the last stage to do")
    parser.add_argument("--only", metavar="STAGE", help="this one, with what it needs")
    options = parser.parse_args(arguments)
    shop = opened(parser, options)
    todo = stages(shop)
    for asked in (options.until, options.only):
        if asked is not None and asked not in todo:
            parser.error(f"no stage {asked!r}; there are {', '.join(todo)}")
    for name, work in todo.items():
        if options.only in (None, name):
            work()
        if name == options.until:
            break


if __name__ == "__main__":
    main()
