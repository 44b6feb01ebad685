"""Input images: from everywhere a prompt file may name, and from nowhere else."""

import base64
import contextlib
import http.server
import io
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from jobs import folder_store, images, outside, settings, storage, stores

QUICK = images.Limits(connect_seconds=1, read_seconds=0.4, total_seconds=1.5)


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(width: int = 48, height: int = 32) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(7).randbytes(3 * width * height))


def png_header(
    width: int, height: int, *more: bytes, bits: int = 8, colours: int = 2, clear: bytes = b""
) -> bytes:
    """A PNG that says it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    ihdr = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    trns = [chunk(b"tRNS", clear)] if clear else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", ihdr), *trns, *(chunk(b"IDAT", body) for body in more), chunk(b"IEND", b"")]
    )


def icc_profile(space: bytes, gamma: float, name: str) -> bytes:
    """Of sRGB's primaries or of greys, with this tone curve."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    text = name.encode() + b"\0"
    named = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": named, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, xyz in (
            (b"r", (0.4361, 0.2225, 0.0139)),
            (b"g", (0.3851, 0.7169, 0.0971)),
            (b"b", (0.1431, 0.0606, 0.7141)),
        ):
            tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*xyz)
            tags[letter + b"TRC"] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4x4s4s4s4s12x4s28x12s48x",
        *(start + len(body), b"\2\x10\0\0", b"mntr", space, b"XYZ ", b"acsp"),
        fixed(0.9642, 1, 0.8249),
    )
    return head + table + body


PNG = encoded(noise())


@pytest.fixture
def config(tmp_path, monkeypatch) -> settings.Settings:
    monkeypatch.chdir(tmp_path)
    return settings.load(home=str(tmp_path / "home"))


@pytest.fixture
def fetch(config, tmp_path) -> Callable[..., images.FetchedImage]:
    def fetch(source: str, **options: Any) -> images.FetchedImage:
        return images.fetch(source, **{"base": tmp_path, "config": config} | options)

    return fetch


@pytest.fixture
def refusal(fetch) -> Callable[..., str]:
    """What is said of a source that is not usable, and never will be."""

    def refusal(source: str, **options: Any) -> str:
        with pytest.raises(images.ImageUnusable) as caught:
            fetch(source, **options)
        assert isinstance(caught.value, ValueError)
        assert str(caught.value) == f"{caught.value.source}: {caught.value.problem}"
        return str(caught.value)

    return refusal


class TestFiles:
    def test_a_path_starts_at_the_prompt_file(self, fetch, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a b.png").write_bytes(PNG)
        for source in ("sub/a b.png", str(tmp_path / "sub" / "a b.png")):
            image = fetch(source)
            assert image.data == PNG
            assert (image.width, image.height, image.format) == (48, 32, "PNG")
            assert image.content_type == "image/png"

    def test_a_file_address(self, fetch, tmp_path):
        (tmp_path / "a b.png").write_bytes(PNG)
        for host in ("", "localhost"):
            assert fetch(f"file://{host}{tmp_path}/a%20b.png").data == PNG

    @pytest.mark.parametrize("source", ["a.png", "file:///a.png", "/etc/passwd", "../a.png"])
    def test_prompts_from_the_network_read_no_files(self, refusal, tmp_path, source):
        (tmp_path / "a.png").write_bytes(PNG)
        told = refusal(source, base=None)
        assert "is a file of one machine" in told
        assert "use https://, s3:// or data:" in told

    @pytest.mark.parametrize(
        ("source", "part"),
        [
            ("none.png", "none.png: there is no such file in "),
            ("/none/none.png", "there is no such file"),
            (".", "is a folder or device"),
            ("/dev/zero", "is a folder or device"),
            ("pipe", "is a folder or device"),
            ("x" * 5000, "cannot be read: File name too long"),
            ("", "named by one line of text"),
            (" ", "named by one line of text"),
            ("a\0b", "named by one line of text"),
            ("a\nb", "named by one line of text"),
            ("file:///a%00b", "cannot be read: not the name of a file"),
            ("file://host/a.png", "must be file:///absolute/path"),
            ("file:a.png", "must be file:///absolute/path"),
            ("file:///a.png?x", "as %3F and %23"),
            ("http://example.com/a.png", "http is not encrypted"),
            ("ftp://example.com/a.png", "use a path, or an address with https://"),
            ("gopher://example.com/", "use a path, or an address with https://"),
        ],
    )
    def test_what_is_no_image_file_is_told(self, refusal, tmp_path, source, part):
        os.mkfifo(tmp_path / "pipe")
        message = refusal(source)
        assert part in message
        assert message.isprintable()
        assert len(message) < 400

    def test_a_file_has_at_most_32_megabytes(self, refusal, tmp_path):
        with (tmp_path / "big.png").open("wb") as file:
            file.write(PNG)
            file.truncate((32 << 20) + 1)
        assert "is larger than 32 MiB: save it smaller" in refusal("big.png")

    def test_the_limit_itself_is_allowed(self, fetch, tmp_path):
        (tmp_path / "a.png").write_bytes(PNG)
        fetch("a.png", limits=images.Limits(max_bytes=len(PNG)))
        with pytest.raises(images.ImageUnusable):
            fetch("a.png", limits=images.Limits(max_bytes=len(PNG) - 1))


class TestDataAddresses:
    def test_base64_of_any_kind_of_image(self, fetch):
        text = base64.b64encode(PNG).decode()
        for head in ("image/png;base64", "image/jpeg;charset=x;base64", "IMAGE/PNG;BASE64"):
            image = fetch(f"data:{head},{text}", base=None)
            assert image.format == "PNG"
        assert image.source.endswith("characters)")
        assert text[:20] not in image.source

    @pytest.mark.parametrize(
        ("source", "part"),
        [
            ("data:image/png;base64,****", "is not base64"),
            ("data:image/png;base64,AAA", "is not base64"),
            ("data:image/png;base64,\u00e9", "is not base64"),
            ("data:image/png,abc", "must begin with data:image/png;base64,"),
            ("data:text/html;base64,AAAA", "must begin with data:image/png;base64,"),
            ("data:", "must begin with"),
            ("data:image/png;base64,", "is empty"),
            ("data:image/png;base64,AAAA", "is no image that can be read"),
        ],
    )
    def test_others_are_refused(self, refusal, source, part):
        assert part in refusal(source)

    def test_a_huge_one_is_not_even_decoded(self, refusal):
        source = "data:image/png;base64," + "A" * 200
        assert "is larger than" in refusal(source, limits=images.Limits(max_bytes=100))


class TestStore:
    def test_an_image_is_stored_once_under_its_hash(self, fetch, tmp_path, config):
        (tmp_path / "a.png").write_bytes(PNG)
        store = stores.open_store(config)
        image = fetch("a.png")
        key = images.store_once(store, image)
        assert key == f"inputs/{image.sha256[:2]}/{image.sha256}"
        assert store.read_bytes(key) == PNG

    def test_what_is_there_is_not_sent_again(self, fetch, tmp_path, config, monkeypatch):
        (tmp_path / "a.png").write_bytes(PNG)
        store = stores.open_store(config)
        key = images.store_once(store, fetch("a.png"))
        monkeypatch.setattr(store, "put_bytes", None)
        assert images.store_once(store, fetch("a.png")) == key

    @pytest.mark.parametrize("other", [b"half", bytes(len(PNG))])
    def test_a_broken_copy_is_replaced(self, fetch, tmp_path, config, other):
        (tmp_path / "a.png").write_bytes(PNG)
        store = stores.open_store(config)
        image = fetch("a.png")
        store.put_bytes(other, image.key, content_type="image/png")
        assert store.read_bytes(images.store_once(store, image)) == PNG

    def test_one_whose_hash_the_store_does_not_know_is_sent_again(
        self, fetch, tmp_path, config, monkeypatch
    ):
        (tmp_path / "a.png").write_bytes(PNG)
        store = stores.open_store(config)
        image = fetch("a.png")
        store.put_bytes(bytes(len(PNG)), image.key, content_type="image/png")
        unknown = storage.ObjectHead(key=image.key, size_bytes=len(PNG), sha256=None)
        monkeypatch.setattr(store, "head", lambda _key: unknown)
        assert store.read_bytes(images.store_once(store, image)) == PNG


class Bucket:
    """Stands in for S3: what `images` asks of a store."""

    def __init__(self, folder: Path, failure: storage.StorageError | None = None) -> None:
        self._store = folder_store.FolderStore(folder)
        self._failure = failure

    def head(self, key: str) -> storage.ObjectHead | None:
        if self._failure:
            raise self._failure
        return self._store.head(key)

    def read_bytes(self, key: str) -> bytes:
        return self._store.read_bytes(key)


class TestS3:
    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch, tmp_path) -> list[str]:
        """Addresses of the buckets that were opened; their objects lie in a folder."""
        asked: list[str] = []

        def open_store(config: settings.Settings) -> Bucket:
            asked.append(config.results_url)
            return Bucket(tmp_path / "bucket")

        stores.open_bucket.cache_clear()
        monkeypatch.setattr(stores, "open_store", open_store)
        (tmp_path / "bucket" / "in").mkdir(parents=True)
        (tmp_path / "bucket" / "in" / "a?b#c.png").write_bytes(PNG)
        return asked

    def test_an_object_of_any_bucket(self, fetch, asked):
        assert fetch("s3://films/in/a?b#c.png", base=None).data == PNG
        assert fetch("S3://films/in/a?b#c.png").data == PNG
        assert asked == ["s3://films"]

    @pytest.mark.parametrize(
        ("source", "part"),
        [
            ("s3://films/none.png", "there is no such object"),
            ("s3://films", "must be s3://bucket/key"),
            ("s3://films/", "must be s3://bucket/key"),
            ("s3:films/a", "must be s3://bucket/key"),
            ("s3:///a", "must be s3://bucket/key"),
            ("s3://films/a//b", "must be s3://bucket/key: parts between slashes"),
        ],
    )
    def test_what_is_no_object_is_told(self, refusal, source, part):
        assert part in refusal(source)

    def test_a_large_object_is_not_read(self, refusal, monkeypatch):
        monkeypatch.setattr(Bucket, "read_bytes", None)
        source = "s3://films/in/a?b#c.png"
        assert "is larger than" in refusal(source, limits=images.Limits(max_bytes=10))

    @pytest.mark.parametrize(
        ("failure", "wanted"),
        [
            (storage.StorageUnavailable, images.ImageUnreachable),
            (storage.KeysRefused, images.ImageUnreachable),
            (storage.StorageDenied, images.ImageUnusable),
        ],
    )
    def test_a_failing_store_is_told_from_a_wrong_name(
        self, fetch, monkeypatch, tmp_path, failure, wanted
    ):
        stores.open_bucket.cache_clear()
        error = failure("s3://films/a", "it says no")
        monkeypatch.setattr(stores, "open_store", lambda config: Bucket(tmp_path, error))
        with pytest.raises(wanted, match="it says no"):
            fetch("s3://films/a")


def test_a_bad_bucket_name_is_told(refusal):
    stores.open_bucket.cache_clear()
    assert "no bucket name in" in refusal("s3://a*b/c")


# https. A real server with a certificate of its own, on this machine: tests only are let in.

Handler = Callable[[http.server.BaseHTTPRequestHandler], None]


@dataclass
class Server:
    port: int
    network: outside.Network
    pages: dict[str, Handler]
    asked: list[http.server.BaseHTTPRequestHandler] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)

    def url(self, path: str, host: str = "images.test") -> str:
        return f"https://{host}:{self.port}{path}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """For images.test, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=images.test"),
            *("-addext", "subjectAltName=DNS:images.test"),
            *("-keyout", str(folder / "key"), "-out", str(folder / "certificate")),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def server(certificate) -> Iterator[Server]:
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self)
            with contextlib.suppress(OSError):
                made.pages[self.path](self)

        def log_message(self, *_args: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        block_on_close = False

        def handle_error(self, *_args: object) -> None:
            pass

    def resolve(host: str, port: int) -> list[str]:
        made.looked_up.append(host)
        return ["127.0.0.1"]

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "certificate", certificate / "key")
    site = Quiet(("127.0.0.1", 0), Site)
    # The handshake happens in the thread of its connection.
    site.socket = tls.wrap_socket(site.socket, server_side=True, do_handshake_on_connect=False)
    trust = str(certificate / "certificate")
    made = Server(
        port=site.server_port,
        network=outside.Network(
            resolve=resolve,
            is_allowed=lambda address: address == "127.0.0.1",
            tls=lambda: ssl.create_default_context(cafile=trust),
        ),
        pages={"/a.png": page(PNG)},
    )
    thread = threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield made
    site.shutdown()
    site.server_close()


def page(body: bytes, *, status: int = 200, **headers: str) -> Handler:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def raw(*pieces: bytes, pause: float = 0.0) -> Handler:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        for piece in pieces:
            request.wfile.write(piece)
            request.wfile.flush()
            time.sleep(pause)

    return answer


class TestHttps:
    @pytest.fixture
    def get(self, fetch, server):
        def get(path: str, limits: images.Limits = QUICK) -> images.FetchedImage:
            return fetch(server.url(path), base=None, network=server.network, limits=limits)

        return get

    def test_an_image_is_fetched_under_its_hosts_name(self, get, server):
        image = get("/a.png")
        assert image.data == PNG
        assert image.source == f"https://images.test:{server.port}/a.png"
        assert server.asked[0].headers["Host"] == f"images.test:{server.port}"
        assert "Authorization" not in server.asked[0].headers

    def test_path_and_query_are_sent_as_they_are(self, get, server):
        server.pages["/%C3%A9%20a%2Fb?x=1&y=%3D"] = page(PNG)
        assert get("/\u00e9 a%2Fb?x=1&y=%3D#part").data == PNG

    def test_the_host_is_looked_up_once(self, get, server):
        """A name that leads elsewhere the second time is never asked a second time."""
        get("/a.png")
        assert server.looked_up == ["images.test"]

    def test_the_checked_address_is_the_one_connected_to(self, fetch, server):
        """What an ordinary client would find under this name does not matter."""
        assert fetch(server.url("/a.png"), network=server.network).data == PNG
        with pytest.raises(socket.gaierror):
            socket.getaddrinfo("images.test", 443)

    def test_the_type_that_the_server_says_does_not_matter(self, get, server):
        server.pages["/x"] = page(PNG, Content_Type="text/html")
        assert get("/x").format == "PNG"
        server.pages["/y"] = page(b"<!DOCTYPE html><p>Log in", Content_Type="image/png")
        with pytest.raises(images.ImageUnusable, match="is a web page: use the address of the im"):
            get("/y")

    def test_a_redirect_may_be_in_any_script(self, get, server):
        answer = "HTTP/1.1 302 Found\r\nLocation: /夜.png\r\nContent-Length: 0\r\n\r\n"
        server.pages["/1"] = raw(answer.encode())
        server.pages["/%E5%A4%9C.png"] = page(PNG)
        assert get("/1").data == PNG

    def test_three_redirects_are_followed(self, get, server):
        server.pages["/1"] = page(b"", status=302, Location="/2")
        server.pages["/2"] = page(b"", status=307, Location=server.url("/3"))
        server.pages["/3"] = page(b"", status=301, Location="a.png")
        assert get("/1").data == PNG
        assert server.looked_up == ["images.test"] * 4

    def test_a_fourth_is_not(self, get, server):
        server.pages["/1"] = page(b"", status=302, Location="/1")
        with pytest.raises(images.ImageUnusable, match="redirects more than 3 times"):
            get("/1")
        assert len(server.asked) == 4

    @pytest.mark.parametrize(
        ("location", "part"),
        [
            ("http://images.test/a.png", "redirects to an address that is not https"),
            ("file:///etc/passwd", "redirects to an address that is not https"),
            ("//[", "redirects to an address that is not https"),
            ("https://10.0.0.1/a.png", "10.0.0.1 is not a public address"),
            ("https://169.254.169.254/latest/meta-data", "is not a public address"),
            ("https://[::1]/a.png", "::1 is not a public address"),
            ("https://2130706433/", "2130706433 is not a public address"),
            ("https://me:secret@images.test/", "user and password in an address are not sent"),
        ],
    )
    def test_each_redirect_is_checked_like_the_first_address(self, fetch, server, location, part):
        def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"] if host == "images.test" else outside._resolve(host, port)

        def is_allowed(address: str) -> bool:
            return (address == "127.0.0.1" and not redirected) or outside.is_public(address)

        redirected: list[bool] = []

        def redirect(request: http.server.BaseHTTPRequestHandler) -> None:
            redirected.append(True)
            page(b"", status=302, Location=location)(request)

        server.pages["/1"] = redirect
        network = outside.Network(resolve=resolve, is_allowed=is_allowed, tls=server.network.tls)
        with pytest.raises(images.ImageUnusable) as caught:
            fetch(server.url("/1"), network=network, limits=QUICK)
        assert part in str(caught.value)
        assert "secret" not in str(caught.value)

    def test_a_host_with_one_private_address_is_refused(self, refusal, server):
        network = outside.Network(
            resolve=lambda host, port: ["127.0.0.1", "10.0.0.1"],
            is_allowed=server.network.is_allowed,
            tls=server.network.tls,
        )
        assert "is not a public address" in refusal(server.url("/a.png"), network=network)
        assert server.asked == []

    def test_the_next_address_is_tried(self, fetch, server):
        network = outside.Network(
            resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"],
            is_allowed=lambda address: True,
            tls=server.network.tls,
        )
        assert fetch(server.url("/a.png"), network=network).data == PNG

    @pytest.mark.parametrize(
        ("host", "part"),
        [("other.test", "its certificate is not trusted: Hostname mismatch")],
    )
    def test_the_certificate_must_be_for_the_host(self, refusal, server, host, part):
        assert part in refusal(server.url("/a.png", host), network=server.network)

    def test_a_certificate_of_nobody_is_refused(self, refusal, server):
        network = outside.Network(
            resolve=server.network.resolve, is_allowed=server.network.is_allowed
        )
        message = refusal(server.url("/a.png"), network=network)
        assert "its certificate is not trusted: self-signed certificate" in message

    def test_a_body_without_a_length_is_fetched(self, get, server):
        server.pages["/x"] = raw(b"HTTP/1.0 200 OK\r\n\r\n", PNG)
        assert get("/x").data == PNG

    def test_a_body_in_chunks_is_fetched(self, get, server):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)
        server.pages["/x"] = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", body)
        assert get("/x").data == PNG

    def test_a_body_that_says_it_is_huge_is_not_read(self, get, server):
        server.pages["/x"] = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        with pytest.raises(images.ImageUnusable, match="is larger than 32 MiB"):
            get("/x")

    @pytest.mark.parametrize(
        "head", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: -5\r\n\r\n"]
    )
    def test_a_body_that_never_ends_is_cut(self, get, server, head):
        sent = []

        def endless(request: http.server.BaseHTTPRequestHandler) -> None:
            request.wfile.write(head)
            while len(sent) < 10_000:
                request.wfile.write(bytes(1 << 16))
                sent.append(1)

        server.pages["/x"] = endless
        with pytest.raises(images.ImageUnusable, match="is larger than 1 MiB"):
            get("/x", images.Limits(max_bytes=1 << 20))
        assert len(sent) < 1000

    def test_a_body_shorter_than_it_says_is_incomplete(self, get, server):
        server.pages["/x"] = page(PNG, Content_Length=str(len(PNG) + 5))
        with pytest.raises(images.ImageUnreachable, match="it ends 5 bytes early; try again"):
            get("/x")

    def test_a_body_longer_than_it_says_is_half_an_image(self, get, server):
        server.pages["/x"] = page(PNG, Content_Length=str(len(PNG) // 2))
        with pytest.raises(images.ImageUnusable, match="damaged or incomplete PNG"):
            get("/x")

    def test_a_compressed_body_is_refused(self, get, server):
        server.pages["/x"] = page(zlib.compress(PNG), Content_Encoding="deflate")
        with pytest.raises(images.ImageUnusable, match="compressed, which was not asked for"):
            get("/x")

    @pytest.mark.parametrize(
        ("status", "wanted"),
        [
            (404, images.ImageUnusable),
            (403, images.ImageUnusable),
            (206, images.ImageUnusable),
            (304, images.ImageUnusable),
            (302, images.ImageUnusable),  # without a Location
            (429, images.ImageUnreachable),
            (503, images.ImageUnreachable),
        ],
    )
    def test_other_answers_are_told(self, get, server, status, wanted):
        server.pages["/x"] = page(b"", status=status)
        with pytest.raises(wanted, match=f"its server answers {status}"):
            get("/x")

    @pytest.mark.parametrize(
        "answer",
        [
            raw(b"", pause=2),
            raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x", pause=2),
        ],
    )
    def test_a_silent_server_is_not_waited_for(self, get, server, answer):
        server.pages["/x"] = answer
        began = time.monotonic()
        with pytest.raises(images.ImageUnreachable, match="it answers too slowly"):
            get("/x")
        assert time.monotonic() - began < 1.5

    @pytest.mark.parametrize(
        "answer",
        [
            raw(b"HTTP/1.1 200 OK\r\n", *[b"x: y\r\n"] * 80, pause=0.05),
            raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"x"] * 80, pause=0.05),
        ],
    )
    def test_a_server_that_drips_is_cut_in_time(self, get, server, answer):
        server.pages["/x"] = answer
        began = time.monotonic()
        with pytest.raises(images.ImageUnreachable, match=r"takes longer than 1.5 seconds"):
            get("/x")
        assert time.monotonic() - began < 2.5

    def test_the_time_is_for_all_redirects_together(self, get, server):
        def slow(request: http.server.BaseHTTPRequestHandler) -> None:
            time.sleep(0.3)
            page(b"", status=302, Location="/x")(request)

        server.pages["/x"] = slow
        limits = images.Limits(read_seconds=1, total_seconds=0.7, max_redirects=10)
        with pytest.raises(images.ImageUnreachable, match=r"takes longer than 0.7 seconds"):
            get("/x", limits)

    @pytest.mark.parametrize(
        "answer",
        [
            raw(b"SSH-2.0-OpenSSH\r\n"),
            raw(b""),
            raw(b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000 + b"\r\n\r\n"),
            raw(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"),
            raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        ],
    )
    def test_what_is_no_http_is_told(self, get, server, answer):
        server.pages["/x"] = answer
        with pytest.raises(images.ImageUnreachable, match="cannot be fetched: "):
            get("/x")

    def test_a_server_without_tls_is_told(self, fetch, server):
        with socket.create_server(("127.0.0.1", 0)) as plain:
            port = plain.getsockname()[1]

            def hang_up() -> None:
                connection, _ = plain.accept()
                with connection:
                    connection.recv(10_000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=hang_up)
            thread.start()
            with pytest.raises(images.ImageUnreachable, match="cannot be fetched"):
                fetch(f"https://images.test:{port}/", network=server.network)
            thread.join()

    def test_nobody_at_that_port_is_told(self, fetch, server):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with pytest.raises(images.ImageUnreachable, match="Connection refused; try again later"):
            fetch(f"https://images.test:{port}/", network=server.network)

    def test_a_slow_lookup_is_not_waited_for(self, fetch):
        network = outside.Network(resolve=lambda host, port: time.sleep(5) or [])
        limits = images.Limits(total_seconds=0.3)
        with pytest.raises(images.ImageUnreachable, match=r"the name a.test is not found in time"):
            fetch("https://a.test/", network=network, limits=limits)

    def test_an_unknown_name_is_told(self, fetch):
        def resolve(host: str, port: int) -> list[str]:
            raise socket.gaierror(-2, "Name or service not known")

        with pytest.raises(images.ImageUnreachable, match=r"the name a.test is not known"):
            fetch("https://a.test/", network=outside.Network(resolve=resolve))

    @pytest.mark.parametrize(
        "source",
        [
            "https://",
            "https:///a.png",
            "https:a.png",
            "https://[::1/a.png",
            "https://a.test:99999/",
            "https://a.test:port/",
            "https://a%2etest/",
            "https://" + "a" * 64 + ".test/",
            "https://a..test/",
            "https://a b.test/",
            "https://a\u3000b.test/",
        ],
    )
    def test_what_is_no_address_is_told(self, refusal, source):
        assert "is not a valid address" in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "https://me:pa55word@images.test/a.png?X-Amz-Signature=s3cr3t#token",
        "https://images.test/a.png?X-Amz-Signature=s3cr3t",
        "https://images.test?token=s3cr3t",
        "https://images.test#s3cr3t",
        "https://images.test/a.png#s3cr3t",
        "https://me:pa55word@images.test",
        "HTTPS://me:pa55word@images.test/a?s3cr3t",
        "http://me:pa55word@images.test/a?token=s3cr3t",
        "ftp://me:pa55word@images.test/a?token=s3cr3t",
        "https://me:pa55word@[::1/a?token=s3cr3t",
        "file://me:pa55word@host/a?token=s3cr3t",
    ],
)
def test_no_message_tells_a_secret(fetch, source):
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(images.ImageError) as caught:
        fetch(source, network=outside.Network(resolve=resolve))
    for text in (str(caught.value), repr(caught.value), caught.value.source):
        assert "s3cr3t" not in text
        assert "pa55word" not in text
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None


NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255",
    "127.0.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1", "192.88.99.1", "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
    "::ffff:a00:1", "64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8", "100::1",
    "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "5f00::1", "fec0::1", "ff02::1", "ff0e::1", "3fff::1",
    "", "localhost", "127.1", "1.2.3", "01.2.3.4",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", "192.0.1.1", "198.20.0.1",
    "2606:4700:4700::1111", "2a00:1450:4001:830::200e", "64:ff9b::8.8.8.8",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_the_internets(address):
    assert not outside.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_internet(address):
    assert outside.is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "0",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "127.0.0.1.",
        "\uff11\uff12\uff17.0.0.1",
        "\u2460\u2461\u2466.0.0.1",
        "127\u30020.0.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "169.254.169.254",
        "2852039166",
        "10.0.0.1",
        "[fd00:ec2::254]",
    ],
)
def test_no_spelling_of_a_private_address_is_connected_to(fetch, monkeypatch, host):
    def connect(*_args: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(images.ImageError) as caught:
        fetch(f"https://{host}/latest/meta-data")
    told = str(caught.value)
    assert "is not a public address" in told or "is not known" in told


class TestContent:
    @pytest.fixture
    def look(self, fetch, tmp_path):
        def look(data: bytes, **options: Any) -> images.FetchedImage:
            (tmp_path / "x.png").write_bytes(data)
            return fetch("x.png", **options)

        return look

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
    def test_these_formats_are_read_whatever_they_are_called(self, look, fmt):
        image = look(encoded(noise(), fmt))
        assert (image.format, image.width, image.height) == (fmt, 48, 32)
        decoded = images.decode_rgb(image.data)
        assert (decoded.mode, decoded.size) == ("RGB", (48, 32))

    @pytest.mark.parametrize("fmt", ["PPM", "ICO", "TGA", "PCX", "JPEG2000", "ICNS"])
    def test_other_formats_are_not(self, look, fmt):
        with pytest.raises(images.ImageUnusable, match="use JPEG, PNG, WebP, BMP, TIFF or GIF"):
            look(encoded(noise(32, 32), fmt))

    @pytest.mark.parametrize(
        ("data", "part"),
        [
            (b"", "is empty"),
            (b"hello", "is no image that can be read"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG: export it as PNG"),
            (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "is XML or SVG"),
            (b"\n <!DOCTYPE HTML><title>404", "is a web page"),
            (b"%PDF-1.7", "is a PDF"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC or AVIF: convert it"),
            (b"\0\0\0\x18ftypavif\0\0\0\0", "is HEIC or AVIF: convert it"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be read"),
        ],
    )
    def test_what_is_no_image_is_told_from_one(self, look, data, part):
        with pytest.raises(images.ImageUnusable, match=r"^x\.png: ") as caught:
            look(data)
        assert part in str(caught.value)

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
    def test_half_an_image_is_none(self, look, fmt, share):
        data = encoded(noise(200, 200), fmt)
        with pytest.raises(images.ImageUnusable, match=r"damaged|incomplete|no image"):
            look(data[: int(len(data) * share)])

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
    def test_any_damage_is_an_image_or_a_refusal(self, look, fmt):
        data = encoded(noise(40, 40), fmt)
        chance = random.Random(fmt)
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(chance.randint(1, 8)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            with contextlib.suppress(images.ImageUnusable):
                images.decode_rgb(look(bytes(broken)).data)

    @pytest.mark.parametrize(
        "size", [(8001, 8000), (20_000, 20_000), (100_000, 100_000), (1, 2**31 - 1)]
    )
    def test_more_than_64_megapixels_are_never_decoded(self, look, size):
        """A few bytes that would unpack to gigabytes."""
        began = time.monotonic()
        with pytest.raises(images.ImageUnusable, match="has more than 64 megapixels"):
            look(png_header(*size, zlib.compress(bytes(1 << 20))))
        assert time.monotonic() - began < 2

    def test_64_megapixels_are_the_limit(self, look):
        data = encoded(Image.new("1", (100, 100)))
        look(data, limits=images.Limits(max_pixels=10_000))
        with pytest.raises(images.ImageUnusable, match=r"\(100x100\): save it smaller"):
            look(data, limits=images.Limits(max_pixels=9_999))

    def test_a_profile_that_unpacks_to_gigabytes_is_refused(self, look):
        body = b"x\0\0" + zlib.compress(bytes(100 << 20), 9)
        head = encoded(noise())[:33]
        chunk = struct.pack(">I", len(body)) + b"iCCP" + body
        data = head + chunk + struct.pack(">I", zlib.crc32(b"iCCP" + body)) + PNG[33:]
        with contextlib.suppress(images.ImageUnusable):
            images.decode_rgb(look(data).data)

    def test_the_first_frame_counts(self, look):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        for fmt in ("GIF", "TIFF", "WEBP", "PNG"):
            options: dict[str, Any] = {"lossless": True} if fmt == "WEBP" else {}
            data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
            assert images.decode_rgb(look(data).data).getpixel((3, 3)) == (255, 0, 0)

    def test_a_jpeg_of_several_pictures_is_a_jpeg(self, look):
        image = look(encoded(noise(), "MPO", save_all=True, append_images=[noise()]))
        assert (image.format, image.content_type) == ("JPEG", "image/jpeg")


class TestDecoding:
    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_a_photograph_taken_sideways_is_turned(self, fetch, tmp_path, fmt):
        """Orientation 6: the camera's top edge is the right edge of what it stored."""
        stored = Image.new("RGB", (64, 32), "blue")
        stored.paste("red", (0, 0, 16, 32))
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = 6
        options: dict[str, Any] = {"lossless": True} if fmt == "WEBP" else {}
        data = encoded(stored, fmt, exif=exif, **options)
        (tmp_path / "x").write_bytes(data)
        fetched = fetch("x")
        assert (fetched.width, fetched.height) == (32, 64)
        assert fetched.data == data
        shown = images.decode_rgb(data)
        assert shown.size == (32, 64)
        red, _, blue = shown.getpixel((16, 4))
        assert red > 200 > 60 > blue

    def test_broken_exif_turns_nothing(self):
        data = encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        assert images.decode_rgb(data).size == (48, 32)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
    def test_what_is_transparent_is_white(self, mode):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 2, 4))
        if mode == "PA":
            image = image.convert("P")
        shown = images.decode_rgb(encoded(image.convert(mode) if mode != "PA" else image))
        assert shown.getpixel((0, 0)) == (0, 0, 0)
        assert shown.getpixel((3, 0)) == (255, 255, 255)

    def test_half_transparent_is_half_white(self):
        shown = images.decode_rgb(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
        assert shown.getpixel((0, 0)) == (127, 127, 127)

    def test_one_transparent_colour_is_white(self):
        image = Image.new("RGB", (2, 2), (1, 2, 3))
        image.putpixel((0, 0), (9, 9, 9))
        shown = images.decode_rgb(encoded(image, transparency=(1, 2, 3)))
        assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(9, 9, 9), (255, 255, 255)]

    @pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
    def test_grey_of_16_bits_keeps_its_shades(self, fmt):
        values = [0, 127, 128, 256, 32_768, 65_407, 65_535]
        pixels = struct.pack("<7H", *values)
        data = encoded(Image.frombytes("I;16", (7, 1), pixels), fmt)
        shown = images.decode_rgb(data)
        assert [shown.getpixel((x, 0))[0] for x in range(7)] == [0, 0, 0, 1, 128, 255, 255]

    @pytest.mark.parametrize(("mode", "part"), [("F", "floating-point"), ("I", "32-bit")])
    def test_pixels_without_a_known_white_are_refused(self, mode, part):
        image = Image.new(mode, (2, 2), 100_000)
        with pytest.raises(images.ImageUnusable, match=f"has {part} pixels: save it with 8 or 16"):
            images.decode_rgb(encoded(image, "TIFF"))
        with pytest.raises(images.ImageUnusable, match=f"^its name: has {part} pixels"):
            images.examine(encoded(image, "TIFF"), "its name")

    def test_a_transparent_shade_of_16_bits_is_white(self):
        image = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 512, 40_000))
        shown = images.decode_rgb(encoded(image, "PNG", transparency=512))
        assert [shown.getpixel((x, 0))[0] for x in (0, 1)] == [255, 156]

    @pytest.mark.parametrize(
        ("bits", "colours", "clear", "row", "shown"),
        [
            (2, 0, b"\0\2", b"\x90", (255, 85)),
            (4, 0, b"\0\3", b"\x39", (255, 153)),
        ],
    )
    def test_a_transparent_colour_of_other_than_8_bits_is_white(
        self, bits, colours, clear, row, shown
    ):
        body = zlib.compress(b"\0" + row)
        image = images.decode_rgb(png_header(2, 1, body, bits=bits, colours=colours, clear=clear))
        assert tuple(image.getpixel((x, 0))[0] for x in (0, 1)) == shown

    def test_print_colours_are_converted(self):
        for fmt in ("JPEG", "TIFF"):
            shown = images.decode_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), fmt))
            red, green, blue = shown.getpixel((4, 4))
            assert red > 200
            assert max(green, blue) < 60

    def test_grey_and_black_and_white_become_rgb(self):
        for mode in ("L", "1"):
            shown = images.decode_rgb(encoded(Image.new(mode, (2, 2), 255)))
            assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (255, 255, 255))

    def test_a_colour_profile_is_followed(self):
        """One in which red and blue are exchanged makes another picture of the same numbers."""
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        other = srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
        other = other.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1)
        other = other.replace(b"????", b"bXYZ", 1)
        image = Image.new("RGB", (2, 2), (200, 100, 50))
        for profile, colour in ((srgb, (200, 100, 50)), (other, (50, 100, 200))):
            shown = images.decode_rgb(encoded(image, icc_profile=profile)).getpixel((0, 0))
            assert all(abs(a - b) <= 1 for a, b in zip(shown, colour, strict=True))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
    def test_a_profile_is_followed_whatever_its_name(self, mode):
        space = b"GRAY" if mode.startswith("L") else b"RGB "
        linear = icc_profile(space, 1.0, "GIMP built-in Linear sRGB")
        image = Image.new("RGB", (2, 2), (55, 55, 55)).convert(mode)
        shown = images.decode_rgb(encoded(image, icc_profile=linear))
        assert shown.getpixel((0, 0)) == (128, 128, 128)

    def test_a_profile_of_srgb_leaves_every_colour_as_it_is(self):
        plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        exponent, coarser = (struct.pack(">i", round(number * 65536)) for number in (2.4, 2.42))
        assert exponent in plain
        image = noise()
        for profile in (plain, plain.replace(exponent, coarser)):
            shown = images.decode_rgb(encoded(image, icc_profile=profile))
            assert shown.tobytes() == image.tobytes()

    def test_a_colour_profile_that_cannot_be_read_is_left_out(self):
        image = Image.new("RGB", (2, 2), (200, 100, 50))
        xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
        for profile in (xyz, b"no profile at all", xyz[:100]):
            data = encoded(image, icc_profile=profile)
            assert images.decode_rgb(data).getpixel((0, 0)) == (200, 100, 50)

    def test_an_image_with_a_profile_and_transparency_keeps_both(self):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
        shown = images.decode_rgb(encoded(image, icc_profile=srgb))
        assert shown.getpixel((0, 0)) == (255, 255, 255)

    def test_what_cannot_be_decoded_is_told(self):
        with pytest.raises(images.ImageUnusable, match="image: is no image"):
            images.decode_rgb(b"x")

    def test_submit_and_worker_see_the_same_size(self, fetch, tmp_path):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[images.ORIENTATION_TAG] = orientation
            (tmp_path / "x").write_bytes(encoded(noise(30, 20), "JPEG", exif=exif))
            fetched = fetch("x")
            assert (fetched.width, fetched.height) == images.decode_rgb(fetched.data).size


def test_the_command_line_starts_without_pillow():
    code = "import sys, jobs.images; sys.exit('PIL' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
