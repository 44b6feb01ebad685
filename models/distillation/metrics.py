"""metrics.csv: a line per student update."""

import csv
import dataclasses
from pathlib import Path

from models.distillation import trainer

FILE = "metrics.csv"
COLUMNS = [field.name for field in dataclasses.fields(trainer.Update)]


class Metrics:
    """Appends to a file that never tells of an update twice."""

    def __init__(self, output: Path, *, updates: int) -> None:
        """`updates` have been done; lines of later ones, from before a resume, are dropped."""
        self._path = output / FILE
        kept = [row for row in _rows(self._path) if int(row["number"]) <= updates]
        part = self._path.with_name(f".{FILE}.part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        part.replace(self._path)

    def add(self, update: trainer.Update) -> None:
        """Append a line; raises OSError for a full disk."""
        values = dataclasses.asdict(update).items()
        row = {
            name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values
        }
        with self._path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(row)


def _rows(path: Path) -> list[dict[str, str]]:
    """Lines of another form, as after a full disk or a power cut, are passed over."""
    if not path.is_file():
        return []
    # Not by csv's reader, which gives up all lines for one that is damaged.
    head, *lines = path.read_text("utf-8", errors="replace").splitlines() or [""]
    if head.split(",") != COLUMNS:
        return []
    rows = [line.split(",") for line in lines if line.isascii() and line.isprintable()]
    return [
        dict(zip(COLUMNS, row, strict=True))
        for row in rows
        if len(row) == len(COLUMNS) and row[0].isdecimal()
    ]
