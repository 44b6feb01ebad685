"""A connection outwards that is cut from another thread. What may be asked is in test_images."""

import socket
import threading

import pytest

from jobs import outside

PLACE = outside.Place.of("https://images.test/a.png")


@pytest.fixture
def connection() -> outside.Connection:
    return outside.Connection(
        PLACE, ["192.0.2.1", "192.0.2.2"], tls=None, connect_seconds=1, read_seconds=1
    )


def test_one_that_is_cut_asks_no_further_address(
    connection: outside.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(address: tuple[str, int], _seconds: float) -> socket.socket:
        asked.append(address[0])
        connection.cut()
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(TimeoutError):
        connection.connect()
    assert asked == ["192.0.2.1"]


def test_one_that_is_cut_while_it_connects_is_not_used(
    connection: outside.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()

    def connect(*_: object) -> socket.socket:
        cutting = threading.Thread(target=connection.cut)
        cutting.start()
        cutting.join()
        return ours

    monkeypatch.setattr(socket, "create_connection", connect)
    with ours, theirs, pytest.raises(TimeoutError):
        connection.connect()
