"""A prompt file whose videos are made at once, by whoever reads it: nothing is stored or queued."""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from jobs import download, errors, inputs, lifecycle, looks, queues, submission

PLAIN_NAMES = {"negative_prompt": "negative prompt", "image_key": "image"}
PLACEMENT = {"offload", "vae_tiling", "text_encoder_on_cpu", "image_encoder_on_cpu"}
PLACEMENT |= {"vae_on_cpu", "unload_encoders"}
"""What a look says of memory alone: whoever ran out of it goes on with another preset."""


class ImageChanged(errors.RushesError):
    """An input image is not what it was when the file was checked."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the image {key} was changed since the prompts were read")


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The videos of a file."""

    claims: Mapping[str, lifecycle.Claim]
    """By what their files are called, in the order of the prompts."""
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    """Where input images come from, by their keys."""
    drawn: frozenset[str] = frozenset()
    """Those whose seed nobody gave."""
    images: inputs.InputImages | None = None

    def read_image(self, key: str) -> bytes:
        """ImageError, or ImageChanged."""
        assert self.images is not None
        found = self.images.read(self.sources[key])
        if found.key != key:
            raise ImageChanged(key)
        return found.data

    def refuse_others(self, folder: Path) -> None:
        """InvalidInput names each video there that was made from something else, by its sidecar."""
        problems = [
            f"{name}.mp4 is there and {unlike}: give another folder, or remove it"
            for name, claim in self.claims.items()
            if (folder / f"{name}.mp4").exists()
            and (unlike := _unlike(folder / f"{name}.json", claim.spec, drawn=name in self.drawn))
        ]
        if problems:
            raise errors.invalid(str(folder), *problems)

    def mixed_files(self, folder: Path) -> list[str]:
        """Of models and LoRAs: those that the videos there were not all made with the same of."""
        found: dict[str, set[str]] = {}
        for name in self.claims:
            for path, sha256 in _made_with(folder / f"{name}.json"):
                found.setdefault(path, set()).add(sha256)
        return sorted(path for path, hashes in found.items() if len(hashes) > 1)


def read(file: submission.PromptFile) -> Orders:
    """All of it, checked as a submit is: InvalidInput lists every bad line."""
    found: list[submission.Order] = []
    plan = submission.plan(file, keep=found.append)
    batch_id = submission.new_batch_id(datetime.now(UTC))
    names = download.Names()
    orders = {names.of(at, order.row.custom_id): order for at, order in enumerate(found)}
    return Orders(
        claims={
            name: _claim(batch_id, position, order)
            for position, (name, order) in enumerate(orders.items())
        },
        notes=plan.notes,
        sources={
            order.image_key: order.row.image
            for order in found
            if order.image_key is not None and order.row.image is not None
        },
        images=file.images,
        drawn=frozenset(name for name, order in orders.items() if order.row.seed is None),
    )


def _unlike(sidecar: Path, asked: looks.RenderSpec, *, drawn: bool) -> str:
    """How a video was made from something else; empty: it was not."""
    try:
        told = json.loads(sidecar.read_text("utf-8"))
        look = {field: told[field] for field in looks.Look.model_fields if field in told}
        facts = {field: told.get(field) for field in looks.RenderSpec.model_fields}
        made = looks.RenderSpec.model_validate(facts | {"look": look})
    except (OSError, ValueError, TypeError, AttributeError):
        return "has no sidecar that says what it was made from"
    ignored = {"look", "seed"} if drawn else {"look"}
    found = [PLAIN_NAMES.get(field, field) for field in _differing(made, asked, ignored)]
    if of_look := list(_differing(made.look, asked.look, PLACEMENT)):
        found.append(f"look ({', '.join(of_look)})")
    return f"was made from another {', '.join(found)}" if found else ""


def _made_with(sidecar: Path) -> Iterator[tuple[str, str]]:
    """Files below the models folder, and their hashes as far as they are known."""
    try:
        told = json.loads(sidecar.read_text("utf-8"))
        for name, sha256 in (told["weights_sha256"] or {}).items():
            yield str(Path(told["model_path"], name)), str(sha256)
        for path, sha256 in (told["loras_sha256"] or {}).items():
            yield path, str(sha256)
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return  # the video is not there, or is older than such hashes


def _differing(one: BaseModel, other: BaseModel, ignored: Set[str]) -> Iterator[str]:
    for field in type(one).model_fields:
        if field not in ignored and getattr(one, field) != getattr(other, field):
            yield field


def _claim(batch_id: str, position: int, order: submission.Order) -> lifecycle.Claim:
    row = order.row
    return lifecycle.Claim(
        attempt_id=position,
        job_id=position,
        batch_id=batch_id,
        custom_id=row.custom_id,
        number=1,
        meta=row.metadata,
        queue=queues.of_model(order.look.model_path),
        spec=looks.RenderSpec(
            look=order.look,
            prompt=row.prompt,
            negative_prompt=row.negative_prompt,
            image_key=order.image_key,
            seed=submission.drawn_seed() if row.seed is None else row.seed,
        ),
    )
