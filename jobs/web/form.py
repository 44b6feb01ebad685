"""The fields of a form, with the values that JSON would have.

OpenAI's client takes objects apart: `metadata[scene]` is a field, and so is `lora[][name]` for each
entry of the list. Fields of one name are in order; how they lay between others is not told.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs import errors, prompt_row, readers

METADATA = re.compile(r"metadata\[([^\[\]]+)\]")
LORA = re.compile(r"lora\[\]\[(name|path|strength)\]")


def values(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """By the keys of a prompt row, as far as they are such. InvalidInput."""
    given: dict[str, str] = {}
    metadata: dict[str, str] = {}
    loras: dict[str, list[str]] = defaultdict(list)
    for name, text in fields:
        if part := LORA.fullmatch(name):
            loras[part[1]].append(text)
            continue
        pair = METADATA.fullmatch(name)
        where, key = (metadata, pair[1]) if pair else (given, name)
        if key in where:
            raise errors.invalid(name, "is given twice: keep one")
        where[key] = text
    for name, parts in (("metadata", metadata), ("lora", loras)):
        if parts and name in given:
            raise errors.invalid(name, "is given whole and in parts: keep one form")
    found = {name: readers.typed(name, text) for name, text in given.items()}
    if metadata:
        found["metadata"] = metadata
    if loras:
        found["lora"] = _entries(loras)
    return found


def _entries(parts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The list of LoRAs. InvalidInput where it is open which strength belongs to which."""
    entries: list[dict[str, Any]] = [
        {key: text} for key in ("name", "path") for text in parts.get(key, ())
    ]
    strengths = parts.get("strength")
    if strengths is None:
        return entries
    if len(strengths) != len(entries) or {"name", "path"} <= parts.keys():
        raise errors.invalid(
            "lora",
            "a form does not tell which strength belongs to which LoRA: give each of them a name, "
            "or each a path, and each a strength; or send the list as a JSON text",
        )
    for entry, strength in zip(entries, strengths, strict=True):
        entry["strength"] = prompt_row.number(strength)
    return entries
