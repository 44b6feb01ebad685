"""A prompt file whose videos are made at once, by whoever reads it: nothing is stored or queued."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from jobs import download, errors, inputs, lifecycle, presets, queues, submission


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
    images: inputs.InputImages | None = None

    def read_image(self, key: str) -> bytes:
        """ImageError, or ImageChanged."""
        assert self.images is not None
        found = self.images.read(self.sources[key])
        if found.key != key:
            raise ImageChanged(key)
        return found.data


def read(file: submission.PromptFile) -> Orders:
    """All of it, checked as a submit is: InvalidInput lists every bad line."""
    found: list[submission.Order] = []
    plan = submission.plan(file, keep=found.append)
    batch_id = submission.new_batch_id(datetime.now(UTC))
    names = download.Names()
    return Orders(
        claims={
            names.of(position, order.row.custom_id): _claim(batch_id, position, order)
            for position, order in enumerate(found)
        },
        notes=plan.notes,
        sources={
            order.image_key: order.row.image
            for order in found
            if order.image_key is not None and order.row.image is not None
        },
        images=file.images,
    )


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
        spec=presets.RenderSpec(
            look=order.look,
            prompt=row.prompt,
            negative_prompt=row.negative_prompt,
            image_key=order.image_key,
            seed=submission.drawn_seed() if row.seed is None else row.seed,
        ),
    )
