"""Input images of image-to-video jobs: fetched once at submit, checked, kept as they came.

The original bytes are stored under their own hash: the image encoder and the resizing must both
start from the original. `decode_rgb` is how submit and worker see them.

Every source may have been written by a stranger: an address must not lead into our own network,
and a file must not be larger, in bytes or pixels, than an image is.
"""

import base64
import binascii
import contextlib
import hashlib
import http.client
import io
import itertools
import os
import ssl
import stat
import struct
import threading
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import errors, image_files, one_line, outside, settings, storage, stores, uploads

if TYPE_CHECKING:
    from PIL import Image, ImageCms, ImageFile

MAX_SHOWN_CHARS = 100
CHUNK_BYTES = 1 << 16
REDIRECTS = {301, 302, 303, 307, 308}
BUSY = {408, 425, 429, 500, 502, 503, 504}

CONTENT_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "GIF": "image/gif",
}
"""The formats that are read, by Pillow's names; of several frames or pages the first."""
FORMATS = "JPEG, PNG, WebP, BMP, TIFF or GIF"

SRGB_ROUNDING = 3  # of 255, between profiles of sRGB; a plain gamma of 2.2 differs by 9
ORIENTATION_TAG = 0x0112
ON_ITS_SIDE = {5, 6, 7, 8}  # values of the tag that exchange width and height

SIGNS_OF_OTHERS = (
    (b"<!doctype html", "is a web page: use the address of the image itself"),
    (b"<html", "is a web page: use the address of the image itself"),
    (b"<svg", "is SVG: export it as PNG"),
    (b"<?xml", "is XML or SVG: export it as PNG"),
    (b"%pdf", "is a PDF: export the page as PNG"),
)
HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"avif", b"avis")

# What Pillow's decoders raise for damaged files; there is no common class.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
)


class ImageError(ValueError):
    """The image cannot be had; the message names it without passwords, and says what would do."""

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        self.problem = problem
        super().__init__(f"{source}: {problem}")


class ImageUnusable(ImageError):
    """Asking again will not help."""


class ImageUnreachable(ImageError):
    """Its server or store does not answer now; later it may."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000
    max_redirects: int = 3
    connect_seconds: float = 5.0
    read_seconds: float = 10.0
    """Of silence."""
    total_seconds: float = 60.0
    """For the whole image, redirects included."""


LIMITS = Limits()
_decoding = threading.BoundedSemaphore(2)
_decoding_large = threading.Lock()
"""Of a process: an image of the most pixels has 256 MB, and takes up to 1 GB while it is decoded,
whatever it was on the wire."""
LARGE_PIXELS = 16_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedImage:
    """The bytes as they came, and what they were found to be."""

    source: str
    """As it may be shown: short, and without passwords."""
    data: bytes
    sha256: str
    format: str
    """One of CONTENT_TYPES, by the content. A JPEG of several pictures (MPO) is one."""
    width: int
    """As a viewer shows it: after the EXIF orientation."""
    height: int

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return uploads.shared_key(self.sha256)

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.format]


# Fetching.


def fetch(
    source: str,
    *,
    base: Path | None,
    config: settings.Settings,
    limits: Limits = LIMITS,
    network: outside.Network = outside.INTERNET,
    checking: contextlib.AbstractContextManager[object] | None = None,
) -> FetchedImage:
    """Get an image from a path, `file://`, `s3://`, `https://` or `data:` and check it.

    Paths start at `base`, the folder of the prompt file. None: prompts that came over the network,
    which must not read files of this machine. `checking` is around what comes after the waiting.
    """
    shown = _shown(source)
    data = _read(source, shown, base=base, config=config, limits=limits, network=network)
    with checking or contextlib.nullcontext():
        return examine(data, shown, limits=limits)


def examine(data: bytes, shown: str, *, limits: Limits = LIMITS) -> FetchedImage:
    """Check an image that is here already; `shown` is what people call it. ImageUnusable."""
    _within(data, shown, limits)
    with _decoding, _decoded(data, shown, limits) as image:
        _check_pixels(image, shown)
        width, height = image.size
        if _orientation(image) in ON_ITS_SIDE:
            width, height = height, width
        return FetchedImage(
            source=shown,
            data=data,
            sha256=hashlib.sha256(data).hexdigest(),
            format="JPEG" if image.format == "MPO" else str(image.format),
            width=width,
            height=height,
        )


def store_once(store: storage.ObjectStore, image: FetchedImage) -> str:
    """The key of the image in the store; uploaded unless it is there, and known to be the same."""
    if not uploads.is_there(store, image.sha256, size_bytes=len(image.data)):
        store.put_bytes(image.data, image.key, content_type=image.content_type)
    return image.key


def _read(
    source: str,
    shown: str,
    *,
    base: Path | None,
    config: settings.Settings,
    limits: Limits,
    network: outside.Network,
) -> bytes:
    if not source.strip() or (wrong := one_line.first_wrong(source)):
        has = f", and this has {wrong!a}" if source.strip() else ""
        raise ImageUnusable(shown, f"an image is named by one line of text{has}")
    scheme = scheme_of(source)
    if scheme == "data":
        return _from_data_url(source, shown, limits)
    if scheme == "https":
        return _from_https(source, shown, limits, network)
    if scheme == "s3":
        return _from_s3(source, shown, limits, config)
    if scheme == "file":
        return _from_file(_path_of_url(source, shown), shown, base, limits)
    if scheme == "http":
        raise ImageUnusable(
            shown,
            "http is not encrypted: anyone on the way could exchange the image; use https, or "
            "download it and give its path",
        )
    if "://" in source:
        raise ImageUnusable(shown, "use a path, or an address with https://, s3:// or file://")
    return _from_file(Path(source), shown, base, limits)


def scheme_of(source: str) -> str:
    """What decides where it is read from: `s3` for `S3://...` too."""
    return source.partition(":")[0].lower()


def _shown(source: str) -> str:
    """Which image is meant, short and safe to print: no user, password, query or fragment."""
    scheme, _, rest = source.partition(":")
    if scheme_of(source) == "data":
        text = f"{source[:30].partition(',')[0]},... ({len(source)} characters)"
    elif rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        authority = authority.partition("?")[0].partition("#")[0].rpartition("@")[2]
        path = path.partition("?")[0].partition("#")[0]
        text = f"{scheme}://{authority}{slash}{path}"
    else:
        text = source
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def _too_large(shown: str, limits: Limits) -> ImageUnusable:
    return ImageUnusable(
        shown, f"is larger than {limits.max_bytes >> 20} MiB: save it smaller, as JPEG for example"
    )


def _from_data_url(source: str, shown: str, limits: Limits) -> bytes:
    head, comma, body = source[5:].partition(",")
    kind, *parameters = head.lower().split(";")
    if not comma or not kind.startswith("image/") or "base64" not in parameters:
        raise ImageUnusable(shown, "must begin with data:image/png;base64, or the like")
    if len(body) // 4 * 3 > limits.max_bytes + 2:
        raise _too_large(shown, limits)
    try:
        data = base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError):
        raise ImageUnusable(shown, "is not base64 behind the comma") from None
    return _within(data, shown, limits)


def _within(data: bytes, shown: str, limits: Limits) -> bytes:
    if len(data) > limits.max_bytes:
        raise _too_large(shown, limits)
    return data


def _path_of_url(source: str, shown: str) -> Path:
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError:
        raise ImageUnusable(shown, "is not a valid address") from None
    path = urllib.parse.unquote(parts.path)
    if parts.netloc.lower() not in ("", "localhost") or not path.startswith("/"):
        raise ImageUnusable(shown, "must be file:///absolute/path, with three slashes")
    if parts.query or parts.fragment:
        raise ImageUnusable(shown, "write ? and # in a file's address as %3F and %23")
    return Path(path)


def _from_file(path: Path, shown: str, base: Path | None, limits: Limits) -> bytes:
    if base is None:
        raise ImageUnusable(
            shown,
            "is a file of one machine, which is read for prompts that are submitted or rendered "
            "there: use https://, s3:// or data:",
        )
    try:
        data = _bytes_of_file(base / path, limits.max_bytes + 1)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {_shown(str(base.absolute()))}"
        raise ImageUnusable(shown, f"there is no such file{where}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not the name of a file"
        raise ImageUnusable(shown, f"cannot be read: {reason}") from None
    if data is None:
        raise ImageUnusable(shown, "is a folder or device, not a file")
    return _within(data, shown, limits)


def _bytes_of_file(path: Path, count: int) -> bytes | None:
    """None if it is no plain file."""
    # Not blocking: a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read(count)


def _from_s3(source: str, shown: str, limits: Limits, config: settings.Settings) -> bytes:
    bucket, _, key = source[5:].partition("/")
    if not source[2:].startswith("://") or not bucket or not key:
        raise ImageUnusable(shown, "must be s3://bucket/key")
    try:
        store = stores.open_bucket(config, bucket)
        head = store.head(key)
        if head is None:
            raise ImageUnusable(shown, "there is no such object")
        if head.size_bytes > limits.max_bytes:
            raise _too_large(shown, limits)
        return _within(store.read_bytes(key), shown, limits)
    except (storage.StorageUnavailable, storage.KeysRefused) as error:
        raise ImageUnreachable(shown, str(error)) from error
    except storage.StorageError as error:
        raise ImageUnusable(shown, str(error)) from error
    except errors.InvalidInput as error:
        problem = "; ".join(problem.message for problem in error.problems)
        raise ImageUnusable(shown, f"must be s3://bucket/key: {problem}") from None


# https


def _from_https(source: str, shown: str, limits: Limits, network: outside.Network) -> bytes:
    deadline = time.monotonic() + limits.total_seconds
    tls = network.tls()
    for _ in range(limits.max_redirects + 1):
        try:
            place = outside.Place.of(source)
        except outside.Refused as error:
            raise ImageUnusable(shown, str(error)) from None
        found = _get(place, shown, deadline, limits, network, tls)
        if isinstance(found, bytes):
            return found
        source = _redirected(source, found, shown)
    raise ImageUnusable(shown, f"redirects more than {limits.max_redirects} times")


def _redirected(source: str, location: str, shown: str) -> str:
    with contextlib.suppress(UnicodeError):  # http.client takes all headers for Latin-1
        location = location.encode("latin-1").decode()
    try:
        target = urllib.parse.urljoin(source, location)
        is_https = urllib.parse.urlsplit(target).scheme == "https"
    except ValueError:
        is_https = False
    if not is_https or not one_line.is_named(location):
        raise ImageUnusable(shown, "redirects to an address that is not https")
    return target


def _get(
    place: outside.Place,
    shown: str,
    deadline: float,
    limits: Limits,
    network: outside.Network,
    tls: ssl.SSLContext,
) -> bytes | str:
    """The body, or where a redirect leads."""
    addresses = _addresses(place, shown, deadline, network)
    connection = outside.Connection(
        place,
        addresses,
        tls=tls,
        connect_seconds=limits.connect_seconds,
        read_seconds=limits.read_seconds,
    )
    headers = {"User-Agent": "rushes", "Accept": "image/*", "Accept-Encoding": "identity"}
    with connection.until(deadline):
        try:
            connection.request("GET", place.target, headers=headers)
            answer = _answer(connection.getresponse(), shown, limits)
            if connection.is_cut:  # which reads like an end
                raise TimeoutError
        except ssl.SSLCertVerificationError as error:
            why = f"its certificate is not trusted: {error.verify_message}"
            raise ImageUnusable(shown, why) from None
        except (OSError, http.client.HTTPException) as error:
            if connection.is_cut or time.monotonic() >= deadline:
                raise _too_slow(shown, limits) from None
            why = f"cannot be fetched: {outside.reason(error)}; try again later"
            raise ImageUnreachable(shown, why) from None
    return answer


def _too_slow(shown: str, limits: Limits) -> ImageUnreachable:
    return ImageUnreachable(
        shown, f"takes longer than {limits.total_seconds:g} seconds: try again, or give a file"
    )


def _addresses(
    place: outside.Place, shown: str, deadline: float, network: outside.Network
) -> list[str]:
    try:
        return outside.addresses(place, deadline=deadline, network=network)
    except outside.Unreachable as error:
        raise ImageUnreachable(shown, str(error)) from None
    except outside.Refused as error:
        raise ImageUnusable(
            shown,
            f"{error}: images are not fetched from this machine or its network; give a path, or "
            "put the image into the results bucket",
        ) from None


def _answer(response: http.client.HTTPResponse, shown: str, limits: Limits) -> bytes | str:
    if response.status in REDIRECTS and (location := response.headers.get("Location")):
        return str(location)
    if response.status in BUSY:
        raise ImageUnreachable(shown, f"its server answers {response.status}; try again later")
    if response.status != 200:
        hint = "is the link still valid?" if response.status in (401, 403, 404, 410) else "not 200"
        raise ImageUnusable(shown, f"its server answers {response.status}: {hint}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ImageUnusable(shown, "its server sends it compressed, which was not asked for")
    if response.length is not None and response.length > limits.max_bytes:
        raise _too_large(shown, limits)
    return _body(response, shown, limits)


def _body(response: http.client.HTTPResponse, shown: str, limits: Limits) -> bytes:
    pieces, size = [], 0
    while piece := response.read(CHUNK_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > limits.max_bytes:
            raise _too_large(shown, limits)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


# Decoding.


def decode_rgb(data: bytes) -> "Image.Image":
    """The image as a viewer shows it, 8-bit sRGB: upright by EXIF, transparent parts white."""
    from PIL import ImageOps

    with _decoded(data, "image", LIMITS) as image:
        fmt = image.format
        with contextlib.suppress(*DECODER_ERRORS):  # broken EXIF turns nothing
            if image_files.has_short_exif(image):
                ImageOps.exif_transpose(image, in_place=True)
        try:
            return _rgb(image)
        except ImageError:
            raise
        except DECODER_ERRORS as error:
            raise ImageUnusable("image", f"this {fmt} cannot be converted: {error}") from None


@contextlib.contextmanager
def _decoded(data: bytes, shown: str, limits: Limits) -> "Iterator[Image.Image]":
    """The first frame, decoded to its end; told apart by content, whatever it is called."""
    from PIL import Image

    reads = image_files.Reads(data)
    with _opened(reads, data, shown, limits) as image:
        pixels = image.width * image.height
        if pixels > limits.max_pixels:
            raise _too_many_pixels(shown, limits, image.size)
        _match_transparency(image)
        with _decoding_large if pixels > LARGE_PIXELS else contextlib.nullcontext():
            try:
                image_files.check_opened(image, reads)
                image.load()
            except image_files.TooMuch as error:
                raise ImageUnusable(shown, str(error)) from None
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise _too_many_pixels(shown, limits) from None
            except DECODER_ERRORS:
                raise ImageUnusable(
                    shown, f"is a damaged or incomplete {image.format}: send the whole file"
                ) from None
            yield image


def _opened(
    reads: image_files.Reads, data: bytes, shown: str, limits: Limits
) -> "ImageFile.ImageFile":
    from PIL import Image, UnidentifiedImageError  # not at the top: most commands need no images

    if not data:
        raise ImageUnusable(shown, "is empty")
    # Small faults of a file, which a viewer would not mention. Not around the call only: filters
    # that come and go are mixed up between threads.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    try:
        image_files.check_bytes(data)
        return Image.open(reads, formats=list(CONTENT_TYPES))
    except image_files.TooMuch as error:
        raise ImageUnusable(shown, str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(shown, limits) from None
    except UnidentifiedImageError:
        raise ImageUnusable(shown, _what_else(data)) from None
    except DECODER_ERRORS:
        raise ImageUnusable(shown, "is damaged: open it in a viewer and save it again") from None


def _match_transparency(image: "ImageFile.ImageFile") -> None:
    """Pillow makes 8 bits of a PNG's pixels, not of the colour that it calls transparent."""
    given = image.info.get("transparency")
    raw_mode = image.tile[0][3] if image.tile else None
    if isinstance(given, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = given * (85 if raw_mode == "L;2" else 17)


def _too_many_pixels(
    shown: str, limits: Limits, size: tuple[int, int] | None = None
) -> ImageUnusable:
    of = "" if size is None else f" ({size[0]}x{size[1]})"
    return ImageUnusable(
        shown, f"has more than {limits.max_pixels // 1_000_000} megapixels{of}: save it smaller"
    )


def _what_else(data: bytes) -> str:
    start = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, meaning in SIGNS_OF_OTHERS:
        if start.startswith(sign):
            return meaning
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        return "is HEIC or AVIF: convert it to JPEG or PNG"
    return f"is no image that can be read: use {FORMATS}"


def _orientation(image: "Image.Image") -> object:
    if not image_files.has_short_exif(image):
        return None
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except DECODER_ERRORS:
        return None


def _check_pixels(image: "Image.Image", shown: str) -> None:
    if image.mode == "F":
        raise ImageUnusable(shown, "has floating-point pixels: save it with 8 or 16 bits")
    if image.mode == "I":
        low, high = image.getextrema()
        assert isinstance(low, int | float)  # of one channel
        assert isinstance(high, int | float)
        if low < 0 or high > 0xFFFF:
            raise ImageUnusable(shown, "has 32-bit pixels: save it with 8 or 16 bits")


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    _check_pixels(image, "image")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return _srgb(image)
    with_alpha = image.convert("RGBA")
    is_grey = image.mode in ("L", "LA")  # and so is its profile, which does for nothing else
    opaque = image.getchannel("L") if is_grey else with_alpha.convert("RGB")
    colours = _srgb(opaque, image.info.get("icc_profile"))
    white = Image.new("RGB", image.size, "white")
    return Image.composite(colours, white, with_alpha.getchannel("A"))


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Grey of 16 bits, which Pillow would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    eight = Image.fromarray(((values * 0xFF + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if (profile := image.info.get("icc_profile")) is not None:
        eight.info["icc_profile"] = profile
    if isinstance(see_through := image.info.get("transparency"), int):
        opaque = np.where(values == see_through, 0, 0xFF).astype(np.uint8)
        eight.putalpha(Image.fromarray(opaque))
    return eight


def _srgb(image: "Image.Image", profile: bytes | None = None) -> "Image.Image":
    """By its colour profile, where it has one that can be read: phones photograph in wider ones."""
    from PIL import ImageCms

    profile = profile or image.info.get("icc_profile")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile and image_files.is_quick(profile):
        with contextlib.suppress(ImageCms.PyCMSError, *DECODER_ERRORS):
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode != "RGB" or not _is_srgb(own):
                return _converted(image, own)
    return image.convert("RGB")


def _is_srgb(profile: "ImageCms.ImageCmsProfile") -> bool:
    """By what it does to colours: linear sRGB has the name as well."""
    from PIL import Image, ImageChops

    levels = range(0, 256, 51)
    cube = bytes(level for colour in itertools.product(levels, repeat=3) for level in colour)
    given = Image.frombytes("RGB", (len(cube) // 3, 1), cube)
    changes = ImageChops.difference(given, _converted(given, profile))
    return max(changes.tobytes()) <= SRGB_ROUNDING


def _converted(image: "Image.Image", profile: "ImageCms.ImageCmsProfile") -> "Image.Image":
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    assert converted is not None  # it is for one that is changed in place
    return converted
