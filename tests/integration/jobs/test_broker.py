"""Redis behind TLS, as both of our clients meet it: Celery's, and our own."""

import contextlib
import datetime
import ipaddress
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jobs import bell, broker, errors, settings
from jobs.doctor import broker as part
from jobs.doctor import examination
from tests.told import told_by

x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

Behind = Callable[[str], "Front"]


class Front(socketserver.ThreadingTCPServer):
    """Ends TLS with a certificate of its own making, and passes on what it hears."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, *, address: str, target: int) -> None:
        self.certificate = folder / "certificate.pem"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*self._write_pair(address))
        self._target = target
        self.heard = b""
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)

    def ask_for_certificates(self) -> None:
        """From clients, signed by its own."""
        self._context.load_verify_locations(self.certificate)
        self._context.verify_mode = ssl.CERT_REQUIRED

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def finish_request(self, request: socket.socket, _address: object) -> None:  # type: ignore[override]  # the library's is wider
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(request, server_side=True) as near,
            socket.create_connection(("127.0.0.1", self._target)) as far,
        ):
            threading.Thread(target=_pass_on, args=(far, near), daemon=True).start()
            while data := near.recv(65536):
                self.heard += data
                far.sendall(data)

    def _write_pair(self, address: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.5.4.3"), "Redis")])
        now = datetime.datetime.now(datetime.UTC)
        signed = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=9))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
            )
            .sign(key, hashes.SHA256())
        )
        self.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_path = self.certificate.with_name("key.pem")
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return self.certificate, key_path


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@pytest.fixture
def front(tmp_path: Path, clean_redis_url: str) -> Iterator[Behind]:
    """`front(address)`: the test's Redis behind a certificate for this address."""
    fronts = []

    def start(address: str) -> Front:
        port = int(clean_redis_url.rpartition(":")[2].partition("/")[0])
        made = Front(tmp_path, address=address, target=port)
        fronts.append(made)
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        return made

    yield start
    for made in fronts:
        made.shutdown()
        made.server_close()


@pytest.fixture
def connected(
    clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., broker.Broker]:
    """With CELERY_BROKER_URL in the environment, where Celery would read it by itself."""

    def connect(front: Front, options: str) -> broker.Broker:
        user, _, _ = clean_redis_url.removeprefix("redis://").rpartition("@")
        url = f"rediss://{user}@127.0.0.1:{front.port}/0{options}"
        monkeypatch.setenv("CELERY_BROKER_URL", url)
        return broker.Broker(settings.load())

    return connect


def test_a_password_is_not_given_to_a_server_that_nobody_vouches_for(
    front: Behind, connected: Callable[..., broker.Broker]
) -> None:
    stranger = front("127.0.0.1")
    bell = connected(stranger, "")
    assert "CERTIFICATE_VERIFY_FAILED" in str(bell.kick())
    with pytest.raises(broker.BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        bell.send_renders("queue", [1])
    assert stranger.heard == b""


def test_nor_to_one_whose_certificate_is_for_another(
    front: Behind, connected: Callable[..., broker.Broker]
) -> None:
    other = front("10.0.0.1")
    bell = connected(other, f"?ssl_ca_certs={other.certificate}")
    assert "not valid for '127.0.0.1'" in str(bell.kick())
    with pytest.raises(broker.BrokerUnavailable, match=r"not valid for '127\.0\.0\.1'"):
        bell.send_renders("queue", [1])
    assert other.heard == b""


@pytest.mark.parametrize(
    "options",
    [
        "ssl_ca_certs={certificate}",
        "ssl_cert_reqs=none",
        "ssl_cert_reqs=CERT_NONE",
        "ssl_ca_certs={certificate}&ssl_check_hostname=false&ssl_ciphers=HIGH",
        "ssl_ca_certs={certificate}&ssl_ca_path=/&ssl_certfile={certificate}&ssl_keyfile={key}",
    ],
)
def test_own_authorities_and_none_at_all_are_taken_by_both_clients(
    front: Behind, connected: Callable[..., broker.Broker], options: str
) -> None:
    own = front("127.0.0.1")
    key = own.certificate.with_name("key.pem")
    bell = connected(own, "?" + options.format(certificate=own.certificate, key=key))
    assert bell.kick() is None
    assert bell.send_renders("queue", [7]) == 1
    assert bell.waiting("queue") == {7}


def test_what_tls_lacks_is_told(front: Behind, connected: Callable[..., broker.Broker]) -> None:
    def advice(options: str) -> str:
        connected(own, options)
        return told_by(part.check)["redis"].advice

    own = front("127.0.0.1")
    assert "ssl_ca_certs must name" in advice("")
    options = f"?ssl_ca_certs={own.certificate}"
    assert advice(options) == ""
    own.ask_for_certificates()
    assert "ssl_certfile and ssl_keyfile" in advice(options)
    key = own.certificate.with_name("key.pem")
    assert advice(f"{options}&ssl_certfile={own.certificate}&ssl_keyfile={key}") == ""


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1:1?db=1", "may have a [?] only with rediss://"),
        ("redis://127.0.0.1:1/0?socket_timeout=5", "may have a [?] only with rediss://"),
        ("redis://127.0.0.1:1/0?password=hunter2", "may have a [?] only with rediss://"),
        ("redis://127.0.0.1:1?ssl_cert_reqs=none", "may have a [?] only with rediss://"),
        ("rediss://127.0.0.1:1/0?db=1", "may say only ssl_ca_certs, ssl_ca_path, "),
        ("rediss://:12?hunter2@127.0.0.1:1/0", "may say only ssl_ca_certs, ssl_ca_path, "),
        ("rediss://:12#hunter2@127.0.0.1:1/0", "may have only the number of a database"),
        ("redis://:12#hunter2@127.0.0.1:1/0", "may have only the number of a database"),
        ("redis://127.0.0.1:1/rushes", "may have only the number of a database"),
        ("redis://me:12/hunter2@127.0.0.1:1/0", "may have only the number of a database"),
        ("sentinel://:hunter2@a:1;sentinel://b:2", "names Sentinel, .* name the primary"),
        ("redis://:x@h/0;redis://:hunter2@127.0.0.1:1/1", "may have no ;"),
        ("redis://me:12;hunter2@127.0.0.1:1/0", "may have no ;: in a password, .* ; %3B,"),
        ("REDIS://:hunter2@127.0.0.1:1/0", "must begin with redis:// or rediss://, got 'REDIS'"),
        ("rediss://:hunter2@127.0.0.1:1/0?ssl_ca_cert=/ca.pem", "may say only ssl_ca_certs, "),
        ("rediss://:hunter2@127.0.0.1:1/0?ssl_min_version=771", "may say only ssl_ca_certs, "),
        ("rediss://:hunter2@127.0.0.1:1/0?ssl_check_hostname=no", "has an ssl_check_hostname that"),
        ("redis://:hunter2@127.0.0.1:0/0", "has port 0"),
        ("redis://:hunter2@redis..local/0", "has a host whose name cannot be one"),
        (f"redis://:hunter2@{64 * 'r'}/0", "has a host whose name cannot be one"),
        ("redis://:hunter2?x@127.0.0.1:1/0", "has no port"),
        ("redis://:hunter2@[127.0.0.1:1/0", "is no address"),
    ],
)
def test_an_address_that_one_client_reads_otherwise_is_refused_and_nothing_of_it_told(
    monkeypatch: pytest.MonkeyPatch, url: str, why: str
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    config = settings.load()
    with pytest.raises(errors.InvalidInput, match=f"CELERY_BROKER_URL {why}") as caught:
        broker.Broker(config)
    told = [str(caught.value), str(bell.kick(config)), str(broker.BrokerUnavailable(url, "gone"))]
    told += [check.seen for check in examination.examine() if "BROKER" in check.name + check.seen]
    assert len(told) >= 5
    for each in told:
        assert "hunter2" not in each
        assert "12" not in each.replace("%23", "")


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://h/", "redis://me:p%2Fw@h:7/15", "rediss://h/0?ssl_cert_reqs=none"],
)
def test_an_address_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    meant = broker.Broker(settings.load()).url
    parts = urlsplit(url)
    assert broker.shown(meant) == f"{parts.scheme}://h:{parts.port or 6379}{parts.path}"


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for path, why in ((tmp_path / "no.pem", "No such file"), (tmp_path, "Is a directory")):
        monkeypatch.setenv("CELERY_BROKER_URL", f"rediss://127.0.0.1:1/0?{name}={path}")
        with pytest.raises(errors.InvalidInput, match=f"in {name} .*{why}.*: '{path}'"):
            broker.Broker(settings.load())


def test_whoever_stored_jobs_hears_of_a_defect_and_can_tell_their_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: broker.Broker) -> None:
        raise TypeError("unexpected keyword argument")

    monkeypatch.setattr(broker.Broker, "kick", broken)
    said = bell.kick(settings.load())
    assert said is not None
    assert said.startswith("TypeError: unexpected keyword argument (this is a defect in rushes); ")


def test_the_rights_of_a_user_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://h/7")
    rights = broker.Broker(settings.load()).rights
    assert "&/7.rushes.pidbox " in rights
    page = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"
    assert rights.replace("/7", "/0") in page.read_text()
