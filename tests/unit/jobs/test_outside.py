"""A connection outwards, also one that is cut. What may be asked is in test_images."""

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


def test_the_two_time_limits_are_told_apart_and_a_usual_port_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = outside.Place.of("http://hooks.test/in")
    connection = outside.Connection(
        place, ["192.0.2.1"], tls=None, connect_seconds=3, read_seconds=7
    )
    ours, theirs = socket.socketpair()
    asked = []

    def connect(address: tuple[str, int], seconds: float) -> socket.socket:
        asked.append((address, seconds))
        return ours

    monkeypatch.setattr(socket, "create_connection", connect)
    with ours, theirs:
        connection.request("GET", place.target)
        assert asked == [(("192.0.2.1", 80), 3)]
        assert ours.gettimeout() == 7
        assert b"\r\nHost: hooks.test\r\n" in theirs.recv(1000)


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
