"""Small files that ask for much: each is refused, and what honest files have of the same is not."""

import io
import os
import struct
import threading
import time
import zlib
from typing import Any

import pytest
from PIL import Image

from jobs import image_files, images

MANY = 1_100_000  # of the smallest parts of a format


def encoded(fmt: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (16, 16), "red")).save(buffer, fmt, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_segments(more: bytes) -> bytes:
    jpeg = encoded("JPEG")
    return jpeg[:2] + more + jpeg[2:]


def with_chunks(more: bytes) -> bytes:
    png = encoded("PNG")
    return png[:33] + more + png[33:]


def with_blocks(more: bytes) -> bytes:
    gif = encoded("GIF", Image.new("P", (16, 16)))
    start = gif.index(b",")
    return gif[:start] + more + gif[start:]


def jpeg_of_scans(scans: int) -> bytes:
    """Progressive, 8x8 grey; each scan after the first says that nothing changes."""

    def table(kind: int, symbol: int) -> bytes:
        return segment(0xC4, bytes([kind << 4, 1, *bytes(15), symbol]))

    def scan(first: int, last: int, bits: bytes) -> bytes:
        return segment(0xDA, bytes([1, 1, 0, first, last, 0])) + bits

    frame = segment(0xC2, struct.pack(">BHHB3B", 8, 8, 8, 1, 1, 0x11, 0))
    head = segment(0xDB, bytes([0] + [1] * 64)) + frame
    more = scan(1, 63, b"\x7f") * (scans - 1)
    return b"\xff\xd8" + head + table(0, 0) + table(1, 0) + scan(0, 0, b"\x7f") + more + b"\xff\xd9"


def tiff(*tags: tuple[int, int, int, int], body: bytes = b"", sides: int = 16) -> bytes:
    """Grey; `body` lies at 8."""
    basics = [(256, 4, 1, sides), (257, 4, 1, sides), (258, 3, 1, 8), (262, 3, 1, 1)]
    entries = sorted([*basics, *tags])
    body += bytes(len(body) % 2)
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(body))
        + body
        + struct.pack("<H", len(entries))
        + (table + bytes(4))
    )


def bmp_rle(width: int, height: int, body: bytes) -> bytes:
    palette = b"".join(bytes([n, 0, 0, 0]) for n in range(256))
    start = 54 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + (palette + body)


def refused(data: bytes, part: str = "has more parts than any image needs") -> None:
    began = time.process_time()
    with pytest.raises(images.ImageUnusable, match=part):
        images.examine(data, "x")
    with pytest.raises(images.ImageUnusable, match=part):
        images.decode_rgb(data)
    assert time.process_time() - began < 15


class TestJpeg:
    def test_no_more_scans_than_encoders_write(self) -> None:
        assert images.examine(jpeg_of_scans(image_files.MAX_SCANS), "x").width == 8
        refused(jpeg_of_scans(image_files.MAX_SCANS + 1), "is a JPEG of more than 64 scans")

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_progressive_ones_are_read(self, mode: str) -> None:
        noise = Image.effect_noise((200, 200), 90).convert(mode)
        for options in ({"progressive": True}, {"restart_marker_blocks": 1}):
            images.examine(encoded("JPEG", noise, **options), "x")

    def test_what_looks_like_a_scan_in_other_data_is_none(self) -> None:
        text = segment(0xFE, b"\xff\xda" * 1_000)
        images.examine(with_segments(text), "x")
        images.examine(encoded("JPEG") + b"\xff\xda" * 1_000, "x")
        images.examine(encoded("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]), "x")

    def test_scans_behind_what_looks_like_an_end_count(self) -> None:
        jpeg = jpeg_of_scans(70)
        start = jpeg.index(b"\xff\xda")
        for more in (b"\xff\xd9", segment(0xFE, b"\xff\xd9"), b"\xff\xff\xff", b"\0"):
            refused(jpeg[:start] + more + jpeg[start:], "scans")

    @pytest.mark.parametrize(
        "part", [b"\xff\xe5\0\2", b"\xff\xfe\0\2", b"\xff\xd0", b"\xff\xd9", b"\xff\xff", b"\0\0"]
    )
    def test_markers_without_end_are_refused(self, part: bytes) -> None:
        jpeg = encoded("JPEG")
        refused(jpeg[:20] + part * MANY + jpeg[20:])

    def test_what_makes_lists_is_there_once(self) -> None:
        frame = segment(0xC0, struct.pack(">BHHB", 8, 16, 16, 1) + bytes([1, 0x11, 0]) * 1_000)
        refused(with_segments(frame))
        exif = segment(0xE1, b"Exif\0\0" + bytes(60_000))
        images.examine(with_segments(exif * image_files.MAX_EXIF_SEGMENTS), "x")
        refused(with_segments(exif * (image_files.MAX_EXIF_SEGMENTS + 1)))

    @pytest.mark.parametrize("marker", [0xE1, 0xFE])
    def test_what_a_segment_holds_is_no_marker(self, marker: int) -> None:
        """Neither of metadata of another kind than EXIF, nor of comments."""
        held = segment(marker, b"http\0" + b"\xff\xda" * image_files.MAX_SCANS)
        images.examine(with_segments(held * (image_files.MAX_EXIF_SEGMENTS + 1)), "x")


class TestOthers:
    def test_chunks_of_a_png_without_end_are_refused(self) -> None:
        data = struct.pack(">I", 1)
        images.examine(with_chunks(chunk(b"teSt", data) * 10_000), "x")
        images.examine(encoded("PNG") + bytes(2_000_000), "x")
        refused(with_chunks(chunk(b"teSt", data) * 100_000))
        png = encoded("PNG")
        start = png.index(b"IDAT") - 4
        refused(png[:start] + chunk(b"IDAT", b"") * 100_000 + png[start:])

    @pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
    def test_so_many_chunks_of_a_png_are_unpacked(self, kind: bytes) -> None:
        """A kilobyte each, and a megabyte when it is unpacked."""
        head = b"x\0\1\0\0\0" if kind == b"iTXt" else b"x\0\0"
        packed = chunk(kind, head + zlib.compress(bytes(1_000)))
        images.examine(with_chunks(packed * image_files.MAX_PACKED_CHUNKS), "x")
        refused(with_chunks(packed * (image_files.MAX_PACKED_CHUNKS + 1)))

    @pytest.mark.parametrize("part", [b"!\xfe\1x\0", b"!\xfe\0", b"\0", b"!\xf9\0\1x\0"])
    def test_blocks_of_a_gif_without_end_are_refused(self, part: bytes) -> None:
        images.examine(with_blocks(part * 1_000), "x")
        refused(with_blocks(part * MANY))

    def test_a_tag_of_a_tiff_has_no_more_values_than_an_image_has_tiles(self) -> None:
        most = image_files.MAX_VALUES
        pixels = (273, 4, 1, 8), (279, 4, 1, 256)
        body = b"\1\0\0\0" * (2 * most + 2)
        images.examine(tiff(*pixels, (282, 5, most, 8), body=body), "x")
        refused(tiff(*pixels, (282, 5, most + 1, 8), body=body))
        refused(tiff((273, 4, most + 1, 8), (278, 4, 1, 1), body=body))
        refused(tiff((273, 1, most + 1, 8), (278, 4, 1, 1), body=body))

    @pytest.mark.parametrize(("order", "is_big"), [("<", False), (">", False), ("<", True)])
    def test_tags_are_counted_in_every_kind_of_tiff(self, order: str, is_big: bool) -> None:
        """Pillow does not read big ones of the other order."""
        head = (b"II" if order == "<" else b"MM") + struct.pack(
            *((f"{order}HHHQQ", 43, 8, 0, 16, 1) if is_big else (f"{order}HLH", 42, 8, 1))
        )
        most, entry = image_files.MAX_VALUES, f"{order}HHQ8x" if is_big else f"{order}HHL4x"
        image_files.check_bytes(head + struct.pack(entry, 324, 1, most))
        with pytest.raises(image_files.TooMuch):
            image_files.check_bytes(head + struct.pack(entry, 324, 1, most + 1))

    def test_a_tile_is_not_much_larger_than_its_image(self) -> None:
        for side, is_read in ((4096, True), (4097, False)):
            packed = zlib.compress(bytes(side * side))
            strips = (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(packed))
            data = tiff((259, 3, 1, 8), *strips, body=packed)
            if is_read:
                images.examine(data, "x")
            else:
                refused(data, "has tiles of more than 16 megapixels")

    def test_a_compressed_bmp_is_small(self) -> None:
        """Each end of a line fills it, pixel for pixel, in Python."""
        assert images.examine(bmp_rle(1000, 1000, b"\1\1\0\0" * 1000), "x").width == 1000
        refused(bmp_rle(4001, 4000, b"\1\1\0\0" * 4000), "is a compressed BMP of more than 16")

    def test_a_compressed_bmp_of_a_step_per_pixel_is_read(self) -> None:
        line = b"\1\5" * 1000 + b"\0\0"
        assert images.examine(bmp_rle(1000, 600, line * 600), "x").height == 600
        refused(bmp_rle(100, 100, b"\0\0" * MANY))

    @pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
    def test_exif_of_megabytes_turns_nothing(self, fmt: str) -> None:
        """One tag of it would be a list of a million numbers."""
        for count, size in ((1, (8, 16)), (image_files.MAX_EXIF_BYTES, (16, 8))):
            value = (6).to_bytes(4, "little") if count == 1 else struct.pack("<I", 26)
            exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 0x112, 3, count) + value
            exif += bytes(4) + b"\6\0" * count
            data = encoded(fmt, Image.new("RGB", (16, 8)), exif=exif)
            fetched = images.examine(data, "x")
            assert (fetched.width, fetched.height) == size
            assert images.decode_rgb(data).size == size

    def test_a_profile_that_lists_one_step_over_and_over_is_passed_over(self) -> None:
        """125,000 of them are a kilobyte of PNG."""

        def fixed(*numbers: float) -> bytes:
            return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

        count, white = 100_000, fixed(0.9642, 1, 0.8249)
        step = b"matf" + bytes(4) + struct.pack(">HH", 3, 3)
        step += struct.pack(">12f", 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
        where = struct.pack(">II", 16 + 8 * count, len(step)) * count
        steps = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, count) + where + step
        body = b"XYZ " + bytes(4) + white + steps
        table = struct.pack(">I4sII", 2, b"wtpt", 156, 20)
        table += struct.pack(">4sII", b"D2B0", 176, len(steps))
        head = struct.pack(">I4sI", 156 + len(body), b"lcms", 0x04300000) + b"mntrRGB XYZ "
        head += bytes(12) + b"acsp" + bytes(28) + white + bytes(48)
        data = encoded("PNG", icc_profile=head + table + body)
        assert len(data) < 5_000
        began = time.process_time()
        assert images.decode_rgb(data).getpixel((0, 0)) == (255, 0, 0)
        assert time.process_time() - began < 5


def test_large_images_are_decoded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 64 megapixels takes up to a gigabyte meanwhile."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 256)
    small, large = encoded("PNG"), encoded("PNG", Image.new("RGB", (16, 17)))
    with images._decoding_large:
        images.examine(small, "x")
        waiting = threading.Thread(target=images.examine, args=(large, "x"))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive()


def test_random_bytes_behind_each_sign_are_refused() -> None:
    for sign in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"GIF89a"):
        for _ in range(50):
            with pytest.raises(images.ImageUnusable):
                images.examine(sign + os.urandom(200), "x")
