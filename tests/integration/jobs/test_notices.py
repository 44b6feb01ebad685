"""Who asked is told once of what happened, and nobody of what did not."""

import contextlib
import http.server
import json
import os
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from datetime import timedelta

import pytest
import standardwebhooks
from sqlalchemy import select, update

from jobs import beat, couriers, database, listeners, notifier, outbox, outside, settings
from jobs.schema import Listener, Notice
from tests.waiting import until

LOCAL = frozenset({"127.0.0.1"})


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it is sent; `answers` are its next statuses, `gate` holds it up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.letters, self.answers = [], []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/hook?key=hidden-key"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.letters.append((dict(self.headers), body))
        self.server.gate.wait(10)
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def make_receiver():
    made = []

    def make():
        server = Receiver()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.gate.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def receiver(make_receiver):
    return make_receiver()


def listen(world, url, *, name="night shift", owner=None, events=(outbox.BATCH_FINISHED,)):
    with world.db.transaction() as session:
        return listeners.add(session, name=name, url=url, owner=owner, events=events)


def finish(world, **options):
    """A batch that ends, some of it well."""
    batch_id = world.submit(2, **options)
    first, second = world.job_ids(batch_id)
    world.succeed(world.claimed(first))
    world.cancel_job(second)
    return batch_id


def notices(world):
    with world.db.reading() as session:
        return session.scalars(select(Notice).order_by(Notice.id)).all()


def make_due(world):
    with world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=1)
        waiting = Notice.next_try_at.is_not(None)
        session.execute(update(Notice).where(waiting).values(next_try_at=past))


@pytest.fixture
def sender(sqlite_world):
    """Makes one round of tries and waits for them; only this machine counts as our network."""
    made = notifier.Notifier(
        settings.load(), db=sqlite_world.db, courier=couriers.Courier(internal_hosts=LOCAL)
    )

    def send():
        begun = made.tick()
        made.wait()
        return begun

    yield send
    made.close()


def test_the_end_of_a_batch_and_its_notices_are_one_change(world):
    listen(world, "https://hooks.test/")
    batch_id = finish(world)
    (notice,) = notices(world)
    data = notice.body["data"]
    assert (notice.body["type"], data["batch_id"]) == ("batch.finished", batch_id)
    assert data["state"] == "cancelled"
    assert data["counts"] == {"total": 2, "succeeded": 1, "failed": 0, "cancelled": 1}
    job_id = world.only_job(world.submit()).id
    attempt_id = world.claimed(job_id)

    def undone(session):
        from jobs import lifecycle
        from tests.integration.jobs.conftest import VIDEO

        lifecycle.succeed(session, attempt_id, video=VIDEO)
        raise KeyError

    with pytest.raises(KeyError):
        world.db.write(undone)
    assert len(notices(world)) == 1
    world.succeed(attempt_id)
    assert len(notices(world)) == 2


def test_a_batch_that_is_taken_up_again_ends_again(sqlite_world):
    listen(sqlite_world, "https://hooks.test/")
    batch_id = finish(sqlite_world)
    sqlite_world.db.write(outbox.batch_ended, outbox.RESULTS_WRITTEN, batch_id)
    assert len(notices(sqlite_world)) == 1, "it was not asked for"
    from jobs.states import JobState

    sqlite_world.retry(batch_id, JobState.CANCELLED)
    sqlite_world.cancel_batch(batch_id)
    first, second = notices(sqlite_world)
    assert first.message_id != second.message_id


def test_an_owner_hears_of_their_own_things_alone(sqlite_world):
    listen(sqlite_world, "https://hooks.test/", owner="ann")
    finish(sqlite_world, owner="bob")
    assert notices(sqlite_world) == []
    finish(sqlite_world, owner="ann")
    assert len(notices(sqlite_world)) == 1


def test_a_notice_is_taken_by_one_of_two_notifiers(world):
    listen(world, "https://hooks.test/")
    finish(world)
    with world.db.transaction() as session:
        (due,) = notifier.take(session, room=8, busy=Counter())
    assert due.tries == 1
    with world.db.transaction() as session:
        assert notifier.take(session, room=8, busy=Counter()) == []


def test_two_notifiers_at_once_neither_wait_nor_send_twice(postgres_world):
    world = postgres_world
    listen(world, "https://hooks.test/")
    for _ in range(3):
        finish(world)
    with world.db.transaction() as one, world.db.transaction() as other:
        taken = [notifier.take(session, room=8, busy=Counter()) for session in (one, other)]
    ids = [due.notice_id for some in taken for due in some]
    assert len(ids) == len(set(ids)) == 3


def test_a_slow_message_is_not_sent_again_meanwhile(world):
    """apprise has no limit of time, so the next try of it comes later than that of a webhook."""
    listen(world, "https://quick.test/")
    listen(world, "mailto://a:b@mail.test/", name="slow")
    finish(world)
    make_due(world)
    world.db.write(notifier.take, room=8, busy=Counter())
    with world.db.reading() as session:
        now = database.now(session)
    quick, slow = sorted((each.next_try_at - now).total_seconds() for each in notices(world))
    assert quick < 70 < notifier.APPRISE_SECONDS - 10 < slow


def test_a_backlog_of_one_receiver_holds_up_no_other(world):
    listen(world, "https://busy.test/", owner="ann")
    listen(world, "https://quiet.test/", name="quiet", owner="bob")
    for _ in range(5):
        finish(world, owner="ann")
    finish(world, owner="bob")
    make_due(world)
    taken = world.db.write(notifier.take, room=8, busy=Counter())
    urls = sorted(due.letter.url for due in taken)
    assert urls == ["https://busy.test/"] * notifier.PER_LISTENER + ["https://quiet.test/"]
    busy = Counter(due.listener_id for due in taken)
    assert world.db.write(notifier.take, room=8, busy=busy) == []
    assert len(world.db.write(notifier.take, room=1, busy=Counter())) == 1


def test_a_backlog_goes_out_as_fast_as_it_is_taken(sqlite_world, receiver):
    listen(sqlite_world, f"http://127.0.0.1:{receiver.server_port}/")
    for _ in range(7):
        finish(sqlite_world)
    receiver.gate.set()
    config = settings.load(tick_seconds=60)
    running = notifier.Notifier(
        config, db=sqlite_world.db, courier=couriers.Courier(internal_hosts=LOCAL)
    )
    stop = threading.Event()
    thread = threading.Thread(target=running.run, args=(stop,))
    thread.start()
    until(lambda: all(each.next_try_at is None for each in notices(sqlite_world)))
    stop.set()
    thread.join()
    assert len(receiver.letters) == 7


def test_it_gives_a_sign_of_life_also_while_the_database_is_away():
    config = settings.load(database_url="postgresql://x@127.0.0.1:1/y", tick_seconds=0.05)
    stop = threading.Event()
    running = notifier.Notifier(config, db=database.connect(config))
    thread = threading.Thread(target=running.run, args=(stop,))
    thread.start()
    sign = beat.of_notifier(config)
    try:
        for _ in range(3):
            until(sign.is_alive)
            os.utime(sign.path, (0, 0))
    finally:
        stop.set()
        thread.join()


def test_a_webhook_is_signed_as_the_standard_says(sqlite_world, receiver, sender, caplog, capfd):
    row = listen(sqlite_world, receiver.url)
    batch_id = finish(sqlite_world)
    assert sender() == 1
    ((headers, body),) = receiver.letters
    told = standardwebhooks.Webhook(row.secret).verify(body, headers)
    assert told["data"]["batch_id"] == batch_id
    (notice,) = notices(sqlite_world)
    assert headers["webhook-id"] == notice.message_id
    assert notice.delivered_at is not None
    assert sender() == 0
    told = caplog.text + "".join(capfd.readouterr())
    assert "notice.delivered" in told
    assert row.secret not in told
    assert "hidden-key" not in told


def test_a_receiver_that_fails_is_asked_again_by_the_same_id_and_then_no_more(
    sqlite_world, receiver, sender
):
    listen(sqlite_world, receiver.url)
    finish(sqlite_world)
    receiver.answers = [500, 301] + [503] * 20
    sender()
    (notice,) = notices(sqlite_world)
    assert notice.error == "the receiver answered 500"
    assert notice.next_try_at - notice.created_at > timedelta(seconds=50)
    assert sender() == 0, "not due yet"
    for _ in range(len(notifier.WAITS_SECONDS) + 3):
        make_due(sqlite_world)
        sender()
    assert len(receiver.letters) == len(notifier.WAITS_SECONDS) + 1
    assert {headers["webhook-id"] for headers, _ in receiver.letters} == {notice.message_id}
    (notice,) = notices(sqlite_world)
    assert (notice.next_try_at, notice.delivered_at) == (None, None)
    assert notice.given_up_at is not None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("hidden-key"), "KeyError"),
        (couriers.NotDelivered("before\0after \udcff"), "before\\0after \\udcff"),
    ],
    ids=["of a library", "in odd words"],
)
def test_a_courier_that_breaks_is_told_and_given_up_in_the_end(postgres_world, error, told):
    class Broken:
        def deliver(self, _letter):
            raise error

    listen(postgres_world, "https://hooks.test/")
    finish(postgres_world)
    made = notifier.Notifier(settings.load(), db=postgres_world.db, courier=Broken())
    for _ in range(len(notifier.WAITS_SECONDS) + 1):
        make_due(postgres_world)
        made.tick()
        made.wait()
    made.close()
    (notice,) = notices(postgres_world)
    assert (notice.error, notice.next_try_at) == (told, None)
    assert notice.given_up_at is not None


def test_a_receiver_that_answers_a_byte_now_and_then_is_given_up(sqlite_world, sender, monkeypatch):
    """No time limit of a socket runs out, and few threads are there for all receivers."""
    monkeypatch.setattr(couriers, "TOTAL_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen(sqlite_world, f"http://127.0.0.1:{server.getsockname()[1]}/")
        finish(sqlite_world)

        def trickle():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 80:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        sender()
        assert time.monotonic() - began < 3
        thread.join()
    (notice,) = notices(sqlite_world)
    assert notice.error


def test_a_receiver_that_is_gone_is_told_no_more(sqlite_world, receiver, sender):
    listen(sqlite_world, receiver.url)
    finish(sqlite_world)
    finish(sqlite_world)
    receiver.answers = [410, 410]
    sender()
    finish(sqlite_world)
    assert sender() == 0
    assert all(notice.given_up_at for notice in notices(sqlite_world))
    with sqlite_world.db.reading() as session:
        assert session.scalar(select(Listener.stopped_at)) is not None


def test_a_try_says_nothing_of_who_has_its_ids_now(sqlite_world):
    """SQLite gives those of a removed listener and of its notices again."""
    listen(sqlite_world, "https://old.test/", name="old")
    finish(sqlite_world)
    (due,) = sqlite_world.db.write(notifier.take, room=8, busy=Counter())
    assert sqlite_world.db.write(listeners.remove, "old") == 1
    listen(sqlite_world, "https://new.test/", name="new")
    finish(sqlite_world)
    (before,) = notices(sqlite_world)
    assert (before.listener_id, before.id) == (due.listener_id, due.notice_id)
    sqlite_world.db.write(notifier.delivered, due)
    for is_gone in (False, True):
        sqlite_world.db.write(notifier.failed, due, error="no", is_gone=is_gone, taken=())
    (after,) = notices(sqlite_world)
    assert (after.next_try_at, after.delivered_at) == (before.next_try_at, None)
    assert (after.error, after.given_up_at) == (None, None)
    with sqlite_world.db.reading() as session:
        assert session.scalar(select(Listener.stopped_at)) is None


def test_a_receiver_that_hangs_holds_up_no_other(sqlite_world, make_receiver):
    slow, quick = make_receiver(), make_receiver()
    slow.gate.clear()
    listen(sqlite_world, slow.url, name="slow")
    for _ in range(4):
        finish(sqlite_world)
    made = notifier.Notifier(
        settings.load(), db=sqlite_world.db, courier=couriers.Courier(internal_hosts=LOCAL)
    )
    assert made.tick() == notifier.PER_LISTENER
    listen(sqlite_world, quick.url, name="quick")
    finish(sqlite_world)
    assert made.tick() == 1
    for _ in range(500):
        if quick.letters:
            break
        threading.Event().wait(0.02)
    assert len(quick.letters) == 1
    assert len(slow.letters) <= notifier.PER_LISTENER
    slow.gate.set()
    made.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://127.0.0.1:1/x", "127.0.0.1 is not a public address, and not in RUSHES_NOTIFY_IN"),
        ("https://169.254.169.254/latest", "169.254.169.254 is not a public address"),
        ("http://example.com/x", "example.com is asked without encryption, and not in RUSHES_NOT"),
        ("https://hooks.test:99999/x", "^is not a valid address$"),
    ],
)
def test_our_own_network_is_not_reached_unless_it_is_named(url, why):
    letter = couriers.Letter(url=url, secret="whsec_" + "A" * 32, message_id="m", body={})
    with pytest.raises(couriers.NotDelivered, match=why):
        couriers.Courier().deliver(letter)


@pytest.mark.parametrize(
    ("named", "url"),
    [
        ("büro.intern", "http://büro.intern:1/x"),
        ("BÜRO.intern", "http://xn--bro-hoa.intern:1/x"),
        ("hooks.intern.", "http://hooks.intern:1/x"),
        ("Hooks.intern", "http://HOOKS.intern.:1/x"),
        ("[::1]", "http://[::1]:1/x"),
        ("::1", "http://[::1]:1/x"),
        ("a..b, ., localhost", "http://localhost.:1/x"),
    ],
)
def test_a_host_of_ours_is_the_same_however_it_is_written(named, url):
    hosts = listeners.internal_hosts(config := settings.load(notify_internal_hosts=named))
    listeners.check(config, name="n", url=url, events=[])
    network = outside.Network(resolve=lambda _host, _port: ["127.0.0.1"])
    letter = couriers.Letter(url=url, secret="whsec_" + "A" * 32, message_id="m", body={})
    with pytest.raises(couriers.NotDelivered, match="Connection refused"):
        couriers.Courier(internal_hosts=hosts, network=network).deliver(letter)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of apprise's own plugins
def test_other_services_are_told_in_words_through_apprise(sqlite_world, receiver, sender, caplog):
    pytest.importorskip("apprise")
    url = f"json://user:hidden-password@127.0.0.1:{receiver.server_port}/"
    listen(sqlite_world, url)
    batch_id = finish(sqlite_world, name="trailer")
    receiver.answers = [500]
    sender()
    make_due(sqlite_world)
    sender()
    told = json.loads(receiver.letters[-1][1])
    assert told["title"] == f"rushes: batch {batch_id} (trailer) cancelled"
    assert "1 succeeded" in told["message"]
    (notice,) = notices(sqlite_world)
    assert notice.delivered_at is not None
    assert "hidden-password" not in caplog.text


class _Mailbox(socketserver.StreamRequestHandler):
    """Takes mails for everybody whom `server.unknown` does not name."""

    def handle(self):
        self.say("220 here")
        for line in self.rfile:
            words = line.decode().strip()
            if words.startswith("rcpt"):
                to = re.search("<(.*)>", words)[1]
                self.say("550 no such user" if to in self.server.unknown else "250 ok")
            elif words == "data":
                self.say("354 go on")
                while self.rfile.readline().strip() != b".":
                    pass
                self.server.mails.append(to)
                self.say("250 ok")
            else:
                self.say("250 ok")

    def say(self, line):
        self.wfile.write(f"{line}\r\n".encode())


@pytest.fixture
def mailbox():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Mailbox) as server:
        server.daemon_threads = True
        server.mails, server.unknown = [], set()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of apprise's own plugins
def test_of_several_recipients_only_those_who_lack_it_are_told_again(sqlite_world, mailbox, sender):
    port = mailbox.server_address[1]
    to = "ann@farm.example,gone@farm.example,bob@farm.example"
    listen(sqlite_world, f"mailto://127.0.0.1:{port}/?from=r@farm.example&to={to}&mode=insecure")
    finish(sqlite_world)
    mailbox.unknown = {"gone@farm.example"}
    for _ in range(2):
        sender()
        make_due(sqlite_world)
    (notice,) = notices(sqlite_world)
    assert notice.error == "apprise could not send to all of mailto://..."
    assert sorted(mailbox.mails) == ["ann@farm.example", "bob@farm.example"]
    assert "farm.example" not in json.dumps(notice.taken)
    mailbox.unknown.clear()
    sender()
    (notice,) = notices(sqlite_world)
    assert notice.delivered_at is not None
    assert mailbox.mails[2:] == ["gone@farm.example"]


def test_a_try_that_lasts_beyond_the_next_one_is_not_doubled(sqlite_world):
    listen(sqlite_world, "https://hooks.test/")
    finish(sqlite_world)
    made, gate = [], threading.Event()

    class Slow:
        def deliver(self, letter):
            made.append(letter.message_id)
            gate.wait(30)

    running = notifier.Notifier(settings.load(), db=sqlite_world.db, courier=Slow())
    assert running.tick() == 1
    make_due(sqlite_world)
    assert running.tick() == 0
    gate.set()
    running.close()
    assert len(made) == 1
    assert notices(sqlite_world)[0].delivered_at is not None


def test_a_listener_that_was_told_something_can_be_removed(sqlite_world, receiver, sender):
    listen(sqlite_world, receiver.url)
    finish(sqlite_world)
    sender()
    finish(sqlite_world)
    assert sqlite_world.db.write(listeners.remove, "night shift") == 1
    assert notices(sqlite_world) == []


@pytest.mark.parametrize(
    ("url", "events", "why"),
    [
        ("http://hooks.test/", [], "must be https"),
        ("https://me:pw@hooks.test/", [], "user and password in an address are not sent"),
        ("https:///x", [], "not a valid address"),
        ("https://hooks.test:99999/x", [], "not a valid address"),
        ("https://hooks.test:abc/x", [], "not a valid address"),
        ("https://hooks..test/x", [], "not a valid address"),
        ("https://.test/x", [], "not a valid address"),
        ("https://hooks%2etest/x", [], "not a valid address"),
        ("hooks.test", [], "must be https://host/path"),
        ("nobody-knows://this", [], "none that apprise knows"),
        ("https://hooks.test/", ["batch.began"], "no batch.began; there are batch.finished"),
    ],
)
def test_a_listener_that_could_never_be_told_is_refused(url, events, why):
    with pytest.raises(Exception, match=why):
        listeners.check(settings.load(), name="n", url=url, events=events)
