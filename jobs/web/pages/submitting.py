"""The page: the form that submits prompts."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from fastapi.responses import Response

from jobs import errors, looks, one_line, presets, prompt_row, queries, readers, submission
from jobs.web import access, batches, bodies, html, images, problems, receiving, service, system
from jobs.web.batches import Serving
from jobs.web.pages import complaints
from jobs.web.pages.complaints import Complaints

router = APIRouter(prefix="/submit", include_in_schema=False, route_class=access.FormRoute)

KEY = re.compile(r"[\w-]{8,64}", re.ASCII)
DEFAULTS = {"repeat": "1", "priority": "0", "strength": "1"}
MORE = ("fps", "lora", "strength", "name", "priority")
FIELD_OF = {
    "width": "size",
    "height": "size",
    "num_frames": "seconds",
    "loras": "lora",
    "LoRA": "lora",
}
"""Words that a message begins with, and the field of the form that they speak of."""
NO_IMAGE = "This preset starts from a picture: choose one."
WHERE_IMAGES_LIE = "give a path, "  # of messages for prompt files
FIELDS = ("prompts", "file", "preset", "image", "seed", "repeat", "size", "seconds", *MORE)

Text = Annotated[str, Form()]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What came with the form, as it was typed."""

    key: Text = ""
    prompts: Text = ""
    preset: Text = ""
    seed: Text = ""
    repeat: Text = "1"
    size: Text = ""
    seconds: Text = ""
    fps: Text = ""
    lora: Text = ""
    strength: Text = "1"
    name: Text = ""
    priority: Text = "0"
    skip_invalid: Annotated[bool, Form()] = False
    file: Annotated[UploadFile | None, File()] = None
    image: Annotated[UploadFile | None, File()] = None

    @property
    def has_file(self) -> bool:
        return self.file is not None and bool(self.file.filename)

    @property
    def texts(self) -> dict[str, Any]:
        """For the form again: browsers do not let us choose the files."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in kept.items() if name not in ("file", "image")}


@router.get("")
def ask(
    request: Request,
    serving: Serving,
    who: access.Submitter,
    preset: str = "",
    made: Annotated[str, Query(max_length=50)] = "",
) -> Response:
    """`made`: the batch before this one, for who may not look at it."""
    presets.check_folder(serving.config.presets_dir)
    chosen = preset or serving.config.default_preset or ""
    if not queries.BATCH_ID_PART.fullmatch(made):
        made = ""
    return _form(request, serving, who, given=DEFAULTS | {"preset": chosen}, found={}, made=made)


@router.post(
    "",
    form_limits={
        "max_part_size": bodies.MAX_TYPED_BYTES,
        "max_fields": bodies.MAX_TYPED_FIELDS,
    },
)
def submit(
    request: Request,
    serving: Serving,
    who: access.Submitter,
    is_own: access.IsOwnForm,
    given: Annotated[Given, Depends()],
) -> Response:
    """All of it is stored, or nothing; what is wrong is told at its field."""
    found = Complaints()
    if not is_own:
        found.add("", complaints.STALE)
        return _form(request, serving, who, given=given.texts, found=found.by_field, status=403)
    made, status = None, 422
    try:
        made = _submitted(serving, who, given, found)
    except complaints.TOLD as error:
        found.add_error(error, at="preset" if isinstance(error, errors.NotFound) else "")
    except submission.AnswerLost:
        raise  # it may be stored
    except problems.OUTAGES as error:
        status = 503
        found.add_outage(error, path=request.url.path)
    if made is None:
        return _form(request, serving, who, given=given.texts, found=found.by_field, status=status)
    did = "submitted" if made.is_new else "again"
    if not who.may_read:
        return html.go(f"/submit?made={made.batch_id}", did=did)
    return html.go(f"/batches/{made.batch_id}", did=did)


def _form(
    request: Request,
    serving: service.Service,
    who: access.Principal,
    *,
    given: dict[str, Any],
    found: dict[str, list[str]],
    status: int = 200,
    made: str = "",
) -> Response:
    shown = dict.fromkeys(FIELDS, "") | {"skip_invalid": False} | given
    is_typed = any(shown[name] != DEFAULTS.get(name, "") for name in MORE)
    return html.page(
        request,
        "submit.html",
        who=who,
        status=status,
        made=made,
        given=shown,
        errors=found,
        key=secrets.token_urlsafe(16),  # each form makes a batch of its own
        presets=preset_choices(serving, who, given=shown["preset"]),
        # Bad lines of a file: there one may choose to leave them out.
        more_is_open=is_typed or shown["skip_invalid"] or "file" in found,
    )


def preset_choices(
    serving: service.Service, who: access.Principal, *, given: str
) -> list[dict[str, Any]]:
    """Each with what it means, in a line. While their folder is away, what was given alone."""
    try:
        found = system.list_presets(serving, who)["presets"]
    except presets.FolderMissing:
        # It may need one: no file comes back with a form, so that its field must be seen.
        return [{"name": given, "hint": "", "needs_image": True}] if given else []
    return [preset | {"hint": _hint(preset)} for preset in found]


def _hint(preset: dict[str, Any]) -> str:
    look = preset["look"]
    words = f"{look['width']}x{look['height']}, {look['num_frames'] / look['fps']:.1f} s"
    kind = "image to video" if preset["needs_image"] else "text to video"
    steps = len(look["denoising_step_list"])
    told = f"{kind}, {words}, {steps} steps, model {look['model_path']}"
    return f"{preset['description']} ({told})" if preset["description"] else told


def _submitted(
    serving: service.Service, who: access.Principal, given: Given, found: Complaints
) -> submission.Submission | None:
    """None: something is wrong, and `found` says what."""
    is_typed = not one_line.is_blank(given.prompts)
    if given.has_file and is_typed:
        found.add("file", "There are prompts above and a file: keep one of them.")
    elif not given.has_file and not is_typed:
        found.add("prompts", "Type a prompt, or choose a file.")
    settings = _settings(given, found)
    repeat = found.whole("repeat", given.repeat or "1")
    priority = found.whole("priority", given.priority or "0")
    preset = serving.preset(given.preset)
    options = submission.Options(
        preset=preset,
        name=given.name.strip() or None,
        repeat=1 if repeat is None else repeat,
        priority=0 if priority is None else priority,
    )
    with contextlib.closing(batches.images_for(serving, who)) as pictures:
        with_image = _image(serving, who, given, pictures, found)
        default = _checked(settings | with_image, options, given, pictures, found)
        if found or default is None:
            return None
        return _stored(serving, who, given, options, default, pictures, found)


def _settings(given: Given, found: Complaints) -> dict[str, Any]:
    """What rows that say nothing of it get, as a row of a prompt file says it."""
    settings: dict[str, Any] = {
        "seed": complaints.number(given.seed),
        "size": given.size.strip().lower().replace("\N{MULTIPLICATION SIGN}", "x") or None,
        "seconds": complaints.number(given.seconds),
        "fps": complaints.number(given.fps),
    }
    names = [name.strip() for name in given.lora.split(",") if name.strip()]
    strength = complaints.number(given.strength or "1")
    if isinstance(strength, str):
        found.add("strength", f"The strength must be a number such as 0.8, got {strength!r}.")
        strength = 1
    if len(names) > looks.MAX_LORAS:
        found.add("lora", f"There may be at most {looks.MAX_LORAS} LoRAs, got {len(names)}.")
    elif names:
        settings["lora"] = [
            {"path" if "/" in name else "name": name, "strength": strength} for name in names
        ]
    return settings


def _image(
    serving: service.Service,
    who: access.Principal,
    given: Given,
    pictures: images.WebImages,
    found: Complaints,
) -> dict[str, str]:
    if given.image is None or not given.image.filename:
        return {}
    try:
        data = receiving.image(serving, who, given.image)
    except errors.InvalidInput as error:
        found.add("image", f"{given.image.filename}: {error.problems[0].message}")
        return {}
    return {"image": pictures.give(data)}


def _checked(
    settings: dict[str, Any],
    options: submission.Options,
    given: Given,
    pictures: images.WebImages,
    found: Complaints,
) -> prompt_row.PromptRow | None:
    """The settings alone, checked as a prompt file of one row: what is wrong belongs to a field."""
    row = {key: value for key, value in settings.items() if value is not None} | {"prompt": "x"}
    probe = submission.PromptFile(
        stream=io.BytesIO(json.dumps(row).encode()),
        source="settings",
        format="jsonl",
        options=options,
        images=pictures,
    )
    kept: list[prompt_row.PromptRow] = []
    try:
        submission.plan(probe, keep=lambda order: kept.append(order.row))
    except errors.InvalidInput as error:
        for problem in error.problems:
            for message in problem.message.split("; "):
                if message.startswith("image is missing"):
                    # The rows of a file may name their own; what was chosen may be no image.
                    if not given.has_file and "image" not in found.by_field:
                        found.add("image", NO_IMAGE)
                elif not message.startswith(WHERE_IMAGES_LIE):
                    found.add(_field(message), message)
        if not found:
            return _read(row)
    return kept[0] if kept else None


def _read(row: dict[str, Any]) -> prompt_row.PromptRow | None:
    lines = io.BytesIO(json.dumps(row).encode())
    read = readers.read(lines, format="jsonl")
    return next((item for item in read if isinstance(item, prompt_row.PromptRow)), None)


def _field(message: str) -> str:
    word = re.split(r"[ :.]", message, maxsplit=1)[0]
    field = FIELD_OF.get(word, word)
    return field if field in FIELDS else ""


def _stored(
    serving: service.Service,
    who: access.Principal,
    given: Given,
    options: submission.Options,
    default: prompt_row.PromptRow,
    pictures: images.WebImages,
    found: Complaints,
) -> submission.Submission | None:
    stream: BinaryIO = io.BytesIO(given.prompts.encode("utf-8", "replace"))
    source = "prompts"
    format: readers.Format = "text"
    if given.has_file:
        assert given.file is not None
        stream, source = given.file.file, given.file.filename or "file"
        format = readers.detect_format(source, stream.read(readers.HEAD_BYTES))
    try:
        return serving.submit(
            stream,
            source=source,
            format=format,
            options=batches.options(
                serving,
                options.preset,
                who,
                key=key_of(given.key, (given.texts, default)),
                name=options.name,
                repeat=options.repeat,
                priority=options.priority,
                skip_invalid=given.skip_invalid and given.has_file,
            ),
            pictures=pictures,
            fill=_filler(default),
        )
    except errors.InvalidInput as error:
        found.add_error(error, at="file" if given.has_file else "prompts")
        return None


def key_of(key: str, told: object) -> str | None:
    """Of the form with this key that says this: sent twice, it makes one batch."""
    if not KEY.fullmatch(key):
        return None
    digest = hashlib.sha256(repr(told).encode("utf-8", "replace")).hexdigest()
    return f"page-{key}-{digest[:16]}"


def _filler(
    default: prompt_row.PromptRow,
) -> Callable[[prompt_row.PromptRow], prompt_row.PromptRow]:
    """Gives a row what it does not say itself; of a size or a length all or nothing."""

    def fill(row: prompt_row.PromptRow) -> prompt_row.PromptRow:
        values: dict[str, Any] = {}
        for names in (("width", "height"), ("seconds", "num_frames"), ("fps",), ("seed",)):
            if all(getattr(row, name) is None for name in names):
                values |= {name: getattr(default, name) for name in names}
        for name in ("image", "lora"):
            if getattr(row, name) is None:
                values[name] = getattr(default, name)
        return dataclasses.replace(row, **values)

    return fill
