"""Other machines, named by addresses that a stranger may have written.

A name is looked up once, every address behind it is checked, and the connection goes to just that
address: neither a redirect nor a second look-up can lead into our own network.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_ADDRESSES = 4  # of one host, tried one after another


class Refused(ValueError):
    """This address is not connected to; the message says why."""


class Unreachable(OSError):
    """The name cannot be looked up now."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not ours, and not a way back to ours."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:  # how networks without IPv4 reach the IPv4 internet
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if any(ip in network for network in _IPV6_SPECIAL):
            return False
    elif any(ip in network for network in _IPV4_SPECIAL):
        return False
    return ip.is_global and not (
        ip.is_private
        or ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_reserved
        or ip.is_unspecified
    )


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_SPECIAL = tuple(
    # Named here because Python's own lists have grown from version to version.
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b:1::/48",  # NAT64 of a local network
        "2001::/23",  # Teredo, and protocols of their own
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fec0::/10",  # site-local
    )
)
_IPV4_SPECIAL = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15"),
        "168.63.129.16/32",  # public, but inside each Azure machine its own host
    )
)


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, kw_only=True)
class Network:
    """How hosts are found and trusted. Other values than these are for tests."""

    resolve: Callable[[str, int], list[str]] = _resolve
    is_allowed: Callable[[str], bool] = is_public
    tls: Callable[[], ssl.SSLContext] = ssl.create_default_context


INTERNET = Network()


def host_of(text: str) -> str:
    """A host as it is looked up, however it is written. Refused when it is none."""
    host = text.removeprefix("[").removesuffix("]").lower()
    try:
        if host and ":" not in host:
            host = host.encode("idna").decode("ascii").removesuffix(".")
    except UnicodeError:
        raise Refused("is not a valid address") from None
    if not host or "%" in host or not all("!" <= character <= "~" for character in host):
        raise Refused("is not a valid address")
    return host


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one https (or http) address leads."""

    host: str
    port: int
    target: str
    """Path and query, as they are sent."""
    is_encrypted: bool = True

    @classmethod
    def of(cls, source: str) -> "Place":
        """Refused when it is none, or holds a password."""
        try:
            parts = urllib.parse.urlsplit(source)
            is_encrypted = parts.scheme.lower() != "http"
            port = parts.port or (443 if is_encrypted else 80)
        except ValueError:
            raise Refused("is not a valid address") from None
        host = host_of(parts.hostname or "")
        if "@" in parts.netloc:
            raise Refused("user and password in an address are not sent: use one that needs none")
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
        target = f"{path}?{query}" if query else path
        return cls(host=host, port=port, target=target, is_encrypted=is_encrypted)


def addresses(place: Place, *, deadline: float, network: Network) -> list[str]:
    """The host's addresses, all of them allowed. Refused, or Unreachable.

    `deadline` is a moment of `time.monotonic`.
    """
    found: list[str] = []
    problem: list[BaseException] = []

    def look_up() -> None:
        try:
            found.extend(network.resolve(place.host, place.port))
        except (OSError, UnicodeError) as error:
            problem.append(error)

    # A lookup has no timeout of its own.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0))
    if thread.is_alive():
        raise Unreachable(f"the name {place.host} is not found in time")
    if problem or not found:
        raise Unreachable(f"the name {place.host} is not known")
    if not all(network.is_allowed(address) for address in found):
        raise Refused(f"{place.host} is not a public address")
    return found[:MAX_ADDRESSES]


class Connection(http.client.HTTPConnection):
    """To addresses that were checked before, under the name of their host. Without `tls`: plain."""

    def __init__(
        self,
        place: Place,
        addresses: list[str],
        *,
        tls: ssl.SSLContext | None,
        connect_seconds: float,
        read_seconds: float,
    ) -> None:
        self.default_port = 80 if tls is None else 443  # of the Host header
        super().__init__(place.host, place.port, timeout=read_seconds)
        self._addresses = addresses
        self._tls = tls
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self.is_cut = False

    def connect(self) -> None:
        plain = self._plain()
        plain.settimeout(self._read_seconds)
        self.sock = plain
        if self._tls is not None:
            # The handshake comes second: `cut` must know the socket while it lasts.
            self.sock = encrypted = self._tls.wrap_socket(
                plain, server_hostname=self.host, do_handshake_on_connect=False
            )
            if not self.is_cut:
                encrypted.do_handshake()
        if self.is_cut:
            raise TimeoutError

    def cut(self) -> None:
        """End it from another thread, wherever it waits."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            if self.sock is not None:
                # Below TLS, whose own shutdown would change the socket under its reader.
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Cut at that moment of `time.monotonic`, closed at the end.

        A server that sends a byte now and then keeps every timeout of a socket from running out.
        """
        watch = threading.Timer(max(deadline - time.monotonic(), 0), self.cut)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
            self.close()

    def _plain(self) -> socket.socket:
        for address in self._addresses[:-1]:
            with contextlib.suppress(OSError):
                return self._to(address)
        return self._to(self._addresses[-1])

    def _to(self, address: str) -> socket.socket:
        if self.is_cut:
            raise TimeoutError
        return socket.create_connection((address, self.port), self._connect_seconds)


def reason(error: Exception) -> str:
    """Why a request failed, in words that may be shown."""
    if isinstance(error, TimeoutError):
        return "it answers too slowly"
    if isinstance(error, http.client.IncompleteRead) and error.expected:
        return f"it ends {error.expected:,} bytes early"
    text = getattr(error, "strerror", None) or type(error).__name__
    return str(text) if str(text).isprintable() else ascii(text)
