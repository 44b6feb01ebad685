"""Work in order in a thread, and what it raises."""

import threading
from concurrent import futures

import pytest
import torch

from worker import behind, errors, rendering


def test_pieces_are_done_in_order_in_one_thread():
    seen = []
    with behind.Behind("test") as beside:
        for number in range(20):
            beside.do(lambda number=number: seen.append((number, threading.get_ident())))
        assert beside.wait()
    assert [number for number, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2


def test_what_a_piece_raises_is_raised_once_to_who_waits():
    with behind.Behind("test") as beside:
        beside.do(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            beside.wait()
        assert beside.wait()


def test_what_a_piece_has_raised_is_known_while_others_wait():
    go_on = threading.Event()
    with behind.Behind("test") as beside:
        beside.do(lambda: 1 // 0)
        beside.do(go_on.wait)
        with pytest.raises(ZeroDivisionError):
            beside.wait(leave=1)
        beside.check()  # the other one has raised nothing
        go_on.set()


def test_a_wait_may_leave_some_and_may_be_cut_short():
    go_on = threading.Event()
    with behind.Behind("test") as beside:
        beside.do(lambda: go_on.wait(10))
        assert beside.wait(leave=1)
        assert not beside.wait(seconds=0.01)
        go_on.set()
        assert beside.wait(seconds=10)


def test_in_several_threads_those_that_are_done_do_not_count():
    go_on = threading.Event()
    with behind.Behind("test", threads=3) as beside:
        beside.do(lambda: go_on.wait(10))
        for _ in range(3):
            beside.do(lambda: None)
        assert beside.wait(leave=1, seconds=10)
        assert not beside.wait(seconds=0.01)
        beside.do(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            beside.wait(leave=1, seconds=10)
        go_on.set()
        assert beside.wait(seconds=10)


def test_at_the_end_what_has_not_begun_is_dropped():
    began, go_on, seen = threading.Event(), threading.Event(), []
    with behind.Behind("test") as beside:
        beside.do(lambda: (began.set(), go_on.wait(10)))
        beside.do(lambda: seen.append(1))
        assert began.wait(10)
        threading.Timer(0.05, go_on.set).start()
    assert seen == []


def test_frames_are_no_longer_taken_after_those_that_were_refused():
    """The rest need not be decoded."""

    class Refusing:
        def look_at(self, _frames):
            raise errors.Refused("not these")

    nothing = dict.fromkeys(("folder", "look", "origin", "writer", "heart"))
    with behind.Behind("frames") as beside:
        encoder = rendering.Encoder(**nothing, check=Refusing(), beside=beside)
        encoder.take(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
        futures.wait(beside._open)
        with pytest.raises(errors.Refused):
            encoder.take(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
