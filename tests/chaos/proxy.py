"""A network that can be broken: between the farm and Redis, PostgreSQL or the object store.

One event loop in a thread serves all proxies; `fault` may be set from any thread.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable
from enum import StrEnum
from pathlib import Path

CHUNK_BYTES = 1 << 16
MAX_HEAD_BYTES = 1 << 16
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message></Error>"


class Fault(StrEnum):
    """What the network does at the moment."""

    NONE = "none"
    HALF_OPEN = "half open"
    """Connections stand, new ones are taken, and nothing comes through."""
    CUT = "cut"
    """Connections are reset, new ones are closed at once."""
    BUSY = "busy"
    """HTTP only: 503 to everything, and nothing reaches the server."""
    DENIED = "denied"
    """HTTP only: 403 to everything, as if the keys had been withdrawn."""
    LOST_ANSWER = "lost answer"
    """HTTP only: the server does what it is asked, and the client never hears of it."""


class Network:
    """The loop that all proxies of one farm run on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def close(self) -> None:
        async def end_all() -> None:
            for server in self.servers:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end_all(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Proxy:
    """Listens on a port of 127.0.0.1 and passes bytes on, unless told otherwise."""

    def __init__(
        self, network: Network, target: Path | int, *, listening: socket.socket | None = None
    ) -> None:
        """`target`: a Unix socket, or a port of 127.0.0.1. `listening`: instead of a port here."""
        self._target = target
        self._network = network
        self._open: set[asyncio.StreamWriter] = set()
        self._opened = 0  # connections so far; the first `_forgotten` of them are dead
        self._forgotten = 0
        self._fault = Fault.NONE
        self._passable = asyncio.Event()
        self._passable.set()
        listening = listening or socket.create_server(("127.0.0.1", 0))
        starting = asyncio.start_server(self._serve, sock=listening, limit=MAX_HEAD_BYTES)
        server = asyncio.run_coroutine_threadsafe(starting, network.loop).result(10)
        network.servers.append(server)
        self.port: int = server.sockets[0].getsockname()[1]

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._network.loop.call_soon_threadsafe(self._change, fault)

    def forget(self) -> None:
        """From now on nothing comes through the connections of now; new ones are good."""
        self._network.loop.call_soon_threadsafe(self._forget)

    def lead_to(self, target: int) -> None:
        """New connections go to another port of 127.0.0.1; those of now stay where they are."""
        self._target = target

    def cut(self) -> None:
        """The connections of now break; new ones are good at once."""
        self._network.loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    def _forget(self) -> None:
        self._forgotten = self._opened

    def _change(self, fault: Fault) -> None:
        was, self._fault = self._fault, fault
        if fault is Fault.HALF_OPEN:
            self._passable.clear()
        elif was is Fault.HALF_OPEN or fault is Fault.CUT:
            # A connection that was forgotten on the way does not come back to life.
            self._abort()
        if fault is not Fault.HALF_OPEN:
            self._passable.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._fault is not Fault.CUT:
                await self._handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # one of the two ends is gone
        except asyncio.CancelledError:
            pass  # the network closes; asyncio would print it
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passable.wait()
        self._opened += 1
        number = self._opened
        up_reader, up_writer = await self._connect()
        try:
            # When one direction ends, so does the other.
            await _first_of(
                self._pump(reader, up_writer, number), self._pump(up_reader, writer, number)
            )
        finally:
            up_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._passable.wait()
            if number <= self._forgotten:
                continue  # taken from the wire, and lost
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection("127.0.0.1", self._target, limit=MAX_HEAD_BYTES)


class HttpProxy(Proxy):
    """Knows where a request ends: it can answer in the server's place or swallow its answer.

    One request per connection.
    """

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passable.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        method, headers = _parsed(head)
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        await self._passable.wait()
        fault = self._fault
        if fault in (Fault.BUSY, Fault.DENIED):
            status, text = (
                ("503 Slow Down", BUSY) if fault is Fault.BUSY else ("403 Forbidden", DENIED)
            )
            answer = b"" if method == "HEAD" else text
            writer.write(_answer(status, answer))
        else:
            answer = await self._forward(head, body)
            if self._fault is Fault.LOST_ANSWER or fault is Fault.LOST_ANSWER:
                return  # the connection breaks instead
            await self._passable.wait()
            writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await self._connect()
        try:
            kept = [
                line
                for line in head.rstrip(b"\r\n").split(b"\r\n")
                if line.partition(b":")[0].lower() not in (b"connection", b"expect")
            ]
            writer.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.transport.abort()


async def _first_of(*works: Awaitable[None]) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _parsed(head: bytes) -> tuple[str, dict[str, str]]:
    first, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in rest)
    return first.partition(" ")[0], {name.lower(): value.strip() for name, _, value in pairs}


def _answer(status: str, body: bytes) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/xml",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
