"""What an image file asks of who opens it: too much is refused before it is done.

Bytes and pixels bound the work and the memory that honest files need, and no others: a progressive
JPEG goes over all its pixels again for a scan of a hundred bytes, and Pillow takes steps of Python
for every part of a file, and keeps an object of it.
"""

import contextlib
import io
import re
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFile

MAX_READS = 1_000_000  # some half a second
MAX_PARTS = 100_000  # a PNG of 32 MB in pieces of 8 kB has 4,000
MAX_SCANS = 64  # libjpeg writes 10, or 18 of CMYK; mozjpeg chooses some twenty out of 64
MAX_EXIF_SEGMENTS = 16  # of 64 kB; the standard allows one
MAX_EXIF_BYTES = 1 << 20
MAX_PACKED_CHUNKS = 300  # of a PNG: profile and texts, each unpacked to 1 MB at most
MAX_TAGS = 0xFFFF  # of a TIFF, as its count of them has 16 bits
MAX_VALUES = 1 << 18  # of one tag: 64 megapixels in tiles of 16x16 have 250,000 of them
MAX_TILE_PIXELS = 4096 * 4096  # a tile is unpacked whole, however small its image is
MAX_RLE_PIXELS = 16_000_000  # of a BMP, which Pillow decodes in Python

MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # of a JPEG, but for those of a restart
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
WITH_LENGTH = FRAMES | {0xC4, 0xCC, *range(0xDA, 0xF0), 0xFE}
START_OF_SCAN, END_OF_IMAGE, EXIF = 0xDA, 0xD9, 0xE1
PACKED_CHUNKS = (b"iCCP", b"zTXt", b"iTXt")
BYTE, ASCII, UNDEFINED = 1, 2, 7  # kinds of values that are not unpacked
STRIP_OFFSETS, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS = 273, 322, 323, 324

TOO_MANY_PARTS = "has more parts than any image needs: open it in a viewer and save it again"


class TooMuch(ValueError):
    """The file is refused, whether it is damaged or made for that; the message says what for."""


class Reads(io.BytesIO):
    """A file of so many reads: Pillow takes one or more for each part of any format."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise TooMuch(TOO_MANY_PARTS)
        return super().read(size)

    def allow(self, more: int) -> None:
        self._left += more


def check_bytes(data: bytes) -> None:
    """Before it is opened. TooMuch."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith((b"II", b"MM")):
        with contextlib.suppress(struct.error, OverflowError):  # its reader says it is damaged
            _check_tiff(data)


def check_opened(image: "ImageFile.ImageFile", reads: Reads) -> None:
    """Before it is decoded. TooMuch."""
    tags = getattr(image, "tag_v2", {})
    sides = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > MAX_TILE_PIXELS:
        raise TooMuch(f"has tiles of more than {MAX_TILE_PIXELS >> 20} megapixels: save it again")
    if image.tile and image.tile[0][0] == "bmp_rle":
        pixels = image.width * image.height
        if pixels > MAX_RLE_PIXELS:
            most = MAX_RLE_PIXELS // 1_000_000
            raise TooMuch(f"is a compressed BMP of more than {most} megapixels: save it as PNG")
        reads.allow(2 * pixels)  # in the worst case each has its own


def has_short_exif(image: "Image.Image") -> bool:
    """A single tag may be a list as long as all of it."""
    texts = (image.info.get(name, b"") for name in ("exif", "Raw profile type exif"))
    return all(len(text) <= MAX_EXIF_BYTES for text in texts)


def is_quick(profile: bytes) -> bool:
    """Whether a colour profile is free of lists of any length of what is done to each colour.

    They may name one step a million times. Hardly any profile has one.
    """
    return b"mpet" not in profile


def _check_jpeg(data: bytes) -> None:
    at, parts, scans, frames, exifs = 2, 0, 0, 0, 0
    while found := MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        parts += 1
        if marker == END_OF_IMAGE and scans:
            return
        if marker in WITH_LENGTH:
            exifs += marker == EXIF and data.startswith(b"Exif\0\0", at + 2)
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)
        scans += marker == START_OF_SCAN
        frames += marker in FRAMES
        if scans > MAX_SCANS:
            raise TooMuch(f"is a JPEG of more than {MAX_SCANS} scans: save it again")
        # Each frame is a list, and the parts of EXIF are joined one by one.
        if frames > 1 or exifs > MAX_EXIF_SEGMENTS or parts > MAX_PARTS:
            raise TooMuch(TOO_MANY_PARTS)


def _check_png(data: bytes) -> None:
    at, parts, packed = 8, 0, 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        at += 12 + size
        parts += 1
        packed += kind in PACKED_CHUNKS
        if packed > MAX_PACKED_CHUNKS or parts > MAX_PARTS:
            raise TooMuch(TOO_MANY_PARTS)


def _check_tiff(data: bytes) -> None:
    """The tags of its first image. More values of one tag than this are lists of Python's."""
    order = ">" if data.startswith(b"MM") else "<"
    is_big = data[2:3] == b"\x2b"
    word = order + ("Q" if is_big else "L")
    how_many, each = order + ("Q" if is_big else "H"), order + ("HHQ8x" if is_big else "HHL4x")
    (at,) = struct.unpack_from(word, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(how_many, data, at)
    if count > MAX_TAGS:
        raise TooMuch(TOO_MANY_PARTS)
    at += struct.calcsize(how_many)
    for nth in range(count):
        tag, kind, values = struct.unpack_from(each, data, at + nth * struct.calcsize(each))
        is_list = kind not in (BYTE, ASCII, UNDEFINED) or tag in (STRIP_OFFSETS, TILE_OFFSETS)
        if is_list and values > MAX_VALUES:
            raise TooMuch(TOO_MANY_PARTS)
