"""Hosts in network namespaces of their own, each at a virtual cable that can be pulled.

The cables end in a namespace that stands for the machine with the servers. What listens there is
opened there and served by proxies of this process. Needs Linux, and either root or a kernel that
lets people make user namespaces; `why_not` says what is missing.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.proxy import Network, Proxy

LIVE = "ip link set lo up && echo ready && exec sleep 3600"
LISTEN = """
import socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
listening = socket.create_server(("0.0.0.0", 0))
socket.send_fds(link, [str(listening.getsockname()[1]).encode()], [listening.fileno()])
"""


def why_not() -> str | None:
    """Why this machine can have no cables; None: it can."""
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"no {', '.join(missing)}: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        [
            *_unshare("--user", "--map-root-user", "--net"),
            "ip link add cable0 type veth peer name eth0",
        ],
        capture_output=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


def _unshare(*what: str) -> list[str]:
    return ["unshare", *what, "--", "sh", "-c"]


@dataclass
class Namespace:
    """A network of its own, for as long as its one process lives."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, command: Sequence[str]) -> "Namespace":
        process = subprocess.Popen([*command, LIVE], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return cls(process)

    @property
    def enter(self) -> list[str]:
        """What a command begins with that runs in it."""
        target = ["nsenter", "--target", str(self.process.pid)]
        return [*target, "--user", "--preserve-credentials", "--net", "--"]

    def ip(self, *words: str) -> None:
        subprocess.run([*self.enter, "ip", *words], check=True)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Cables:
    """Made by `laid`: a namespace for the servers, and one per host."""

    servers: Namespace
    hosts: list[Namespace] = field(default_factory=list)

    def add_host(self) -> Namespace:
        """Its cable is in; the servers are at `address_for` it."""
        host = Namespace.start([*self.servers.enter, *_unshare("--net")])
        number, peer = len(self.hosts), str(host.process.pid)
        self.hosts.append(host)
        cable = f"cable{number}"
        self.servers.ip(
            *("link", "add", cable, "type", "veth"), *("peer", "name", "eth0", "netns", peer)
        )
        self.servers.ip("addr", "add", f"{self.address_for(number)}/24", "dev", cable)
        host.ip("addr", "add", f"10.7.{number}.2/24", "dev", "eth0")
        self.servers.ip("link", "set", cable, "up")
        host.ip("link", "set", "eth0", "up")
        return host

    def address_for(self, number: int) -> str:
        return f"10.7.{number}.1"

    def pull(self, number: int) -> None:
        """Packets of this host are lost in both directions; connections hear nothing of it."""
        self.servers.ip("link", "set", f"cable{number}", "down")

    def plug(self, number: int) -> None:
        self.servers.ip("link", "set", f"cable{number}", "up")

    def proxy(self, network: Network, port: int) -> Proxy:
        """Listens where the hosts can reach it, and leads to a port of 127.0.0.1 out here."""
        here, there = socket.socketpair()
        with here, there:
            subprocess.run(
                [*self.servers.enter, sys.executable, "-S", "-c", LISTEN, str(there.fileno())],
                pass_fds=[there.fileno()],
                check=True,
            )
            _, (descriptor, *_), _, _ = socket.recv_fds(here, 16, 1)
        return Proxy(network, port, listening=socket.socket(fileno=descriptor))


@contextlib.contextmanager
def laid(hosts: int):
    cables = Cables(Namespace.start(_unshare("--user", "--map-root-user", "--net")))
    try:
        for _ in range(hosts):
            cables.add_host()
        yield cables
    finally:
        for namespace in (*cables.hosts, cables.servers):
            namespace.stop()
