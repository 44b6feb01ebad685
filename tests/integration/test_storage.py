"""One contract for both stores, then what is special about each. The S3 server is a real one."""

import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, ResponseStreamingError
from botocore.response import StreamingBody

from jobs import errors, folder_store, s3_clients, s3_store, servers, settings, storage, stores

VIDEO = b"\x00\x00\x00 ftypisom" + bytes(range(256)) * 5000  # more than one chunk


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        (tmp_path / "re sults").mkdir()
        values = settings.load(results_url=(tmp_path / "re sults").as_uri())
    else:
        values = settings.Settings(**request.getfixturevalue("s3"))
    return stores.open_store(values)


@pytest.fixture
def in_s3(s3):
    return stores.open_store(settings.Settings(**s3))


@pytest.fixture
def in_folder(tmp_path):
    return folder_store.FolderStore(tmp_path / "results")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(VIDEO)
    return path


def test_a_put_file_can_be_read_back(store, video):
    stored = store.put_file(video, "batches/1/a b+ü.mp4", content_type="video/mp4")
    sha256 = hashlib.sha256(VIDEO).hexdigest()
    assert stored == storage.StoredObject(
        key="batches/1/a b+ü.mp4", size_bytes=len(VIDEO), sha256=sha256
    )
    assert store.read_bytes(stored.key) == VIDEO
    assert store.head(stored.key) == storage.ObjectHead(
        key=stored.key, size_bytes=len(VIDEO), sha256=sha256
    )


def test_put_overwrites(store):
    store.put_bytes(b"first, and longer", "key", content_type="text/plain")
    store.put_bytes(b"second", "key", content_type="text/plain")
    assert store.read_bytes("key") == b"second"


def test_an_empty_object_is_an_object(store):
    store.put_bytes(b"", "errors.jsonl", content_type="application/jsonl")
    assert store.read_bytes("errors.jsonl") == b""
    assert store.head("errors.jsonl").size_bytes == 0


def test_download_writes_the_whole_file(store, tmp_path):
    store.put_bytes(VIDEO, "video.mp4", content_type="video/mp4")
    store.download("video.mp4", tmp_path / "got.mp4")
    assert (tmp_path / "got.mp4").read_bytes() == VIDEO


def test_a_failed_download_leaves_the_old_file(store, tmp_path):
    target = tmp_path / "target" / "got.mp4"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(storage.ObjectMissing):
        store.download("missing", target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["got.mp4"]


def test_a_missing_object_has_no_head_and_cannot_be_read(store):
    assert store.head("batches/none") is None
    with pytest.raises(storage.ObjectMissing, match="batches/none: no such object"):
        store.read_bytes("batches/none")


def test_a_folder_is_not_an_object(store):
    store.put_bytes(b"x", "batches/1/x", content_type="text/plain")
    assert store.head("batches/1") is None
    assert store.head("batches/1/x/y") is None


def test_list_gives_the_keys_that_start_with_the_prefix_in_order(store):
    for key in ("b/7/x", "b/77/y", "b/8/z", "a", "b/7/w/v"):
        store.put_bytes(b"x", key, content_type="text/plain")
    assert list(store.list()) == ["a", "b/7/w/v", "b/7/x", "b/77/y", "b/8/z"]
    assert list(store.list("b/7")) == ["b/7/w/v", "b/7/x", "b/77/y"]
    assert list(store.list("b/7/")) == ["b/7/w/v", "b/7/x"]
    assert list(store.list("none/")) == []


def test_delete_is_safe_to_call_twice(store):
    store.put_bytes(b"x", "a/b", content_type="text/plain")
    store.delete("a/b")
    store.delete("a/b")
    assert store.head("a/b") is None
    assert list(store.list()) == []


def test_entries_tell_size_and_age_in_the_order_of_the_keys(store):
    began = datetime.now(UTC) - timedelta(seconds=2)  # some stores count whole seconds
    store.put_bytes(b"12345", "a/c", content_type="text/plain")
    store.put_bytes(b"1", "a/b", content_type="text/plain")
    entries = list(store.entries("a/"))
    assert [(entry.key, entry.size_bytes) for entry in entries] == [("a/b", 1), ("a/c", 5)]
    assert all(began < entry.modified_at <= datetime.now(UTC) for entry in entries)


def test_many_are_deleted_at_once_and_nothing_else_is(store):
    keys = [f"a/{number:02}/x y+ü" for number in range(20)]
    for key in (*keys, "a/21", "b"):
        store.put_bytes(b"x", key, content_type="text/plain")
    store.delete_many([])
    for _ in range(2):
        store.delete_many([*keys, "a/none"])
        assert list(store.list()) == ["a/21", "b"]


def test_a_folder_store_keeps_no_empty_folders(in_folder, tmp_path):
    in_folder.put_bytes(b"x", "a/b/c", content_type="text/plain")
    in_folder.put_bytes(b"x", "a/d", content_type="text/plain")
    in_folder.delete("a/b/c")
    assert sorted(path.name for path in tmp_path.glob("results/**/*")) == ["a", "d"]
    in_folder.delete("a/d")
    assert list((tmp_path / "results").iterdir()) == []
    in_folder.put_bytes(b"x", "a/d", content_type="text/plain")


def test_a_store_without_the_call_for_many_is_asked_one_by_one(in_s3, monkeypatch):
    for key in ("a", "b"):
        in_s3.put_bytes(b"x", key, content_type="text/plain")

    def refuse(**_):
        answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
        raise ClientError(answer, "DeleteObjects")

    monkeypatch.setattr(in_s3._client, "delete_objects", refuse)
    in_s3.delete_many(["a", "b"])
    assert list(in_s3.list()) == []


def test_a_bucket_tells_whether_it_keeps_versions(in_s3, monkeypatch):
    for answer in ({}, {"Status": "Suspended"}, {"Status": "Enabled"}):
        monkeypatch.setattr(
            in_s3._client, "get_bucket_versioning", lambda answer=answer, **_: answer
        )
        assert in_s3.keeps_versions() is (answer.get("Status") == "Enabled")


def test_a_fresh_store_checks_out_and_stays_empty(store):
    store.check()
    assert list(store.list()) == []


def test_addresses_start_with_the_url(store):
    assert store.address("a/b.mp4") == f"{store.url}/a/b.mp4"


def test_a_link_reads_the_object(store):
    store.put_bytes(VIDEO, "a/b c.mp4", content_type="video/mp4")
    link = store.presign("a/b c.mp4", seconds=60, file_name=None)
    with _open(link) as answer:
        assert answer.read() == VIDEO


@pytest.mark.parametrize("seconds", [0, -1, 7 * 24 * 3600 + 1])
def test_a_link_lives_for_up_to_seven_days(store, seconds):
    with pytest.raises(errors.InvalidInput, match="7 days"):
        store.presign("key", seconds=seconds)


KEYS_NOT_TO_HOLD = (
    "",
    "/etc/passwd",
    "../up",
    "a/../../up",
    "a/./b",
    "a//b",
    "a/",
    "a\\b",
    "a\nb",
    "a\0b",
    "a\ud800",
    "a/" + "b" * 256,
    "/".join(["a" * 100] * 10),
    f"{storage.PART_PREFIX}x",
    "a/.rclone_temp_x",
)


def test_a_key_that_some_store_cannot_hold_is_refused(store):
    for key in KEYS_NOT_TO_HOLD:
        with pytest.raises(errors.InvalidInput, match="object key"):
            store.put_bytes(b"x", key, content_type="text/plain")
        with pytest.raises(errors.InvalidInput):
            store.read_bytes(key)


def test_a_missing_local_file_is_not_a_missing_object(store, tmp_path):
    with pytest.raises(FileNotFoundError):
        store.put_file(tmp_path / "none.mp4", "key", content_type="video/mp4")


def test_threads_share_a_store(store):
    def round_trip(number):
        data = os.urandom(2000 + number)
        store.put_bytes(data, f"many/{number:03}", content_type="video/mp4")
        return store.read_bytes(f"many/{number:03}") == data

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(40)))
    assert len(list(store.list("many/"))) == 40


def test_a_reader_never_sees_half_an_object(store):
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    store.put_bytes(contents[0], "key", content_type="text/plain")
    is_done = threading.Event()

    def read():
        while not is_done.is_set():
            assert store.read_bytes("key") in contents

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(10):
            store.put_bytes(contents[number % 2], "key", content_type="text/plain")
        is_done.set()
        for reader in readers:
            reader.result()


# S3


def test_a_link_with_a_file_name_is_saved_under_it(in_s3):
    in_s3.put_bytes(VIDEO, "b.mp4", content_type="video/mp4")
    link = in_s3.presign("b.mp4", seconds=60, file_name='Füchse "1".mp4')
    with _open(link) as answer:
        assert answer.headers["Content-Type"] == "video/mp4"
        assert answer.headers["Content-Disposition"] == (
            "attachment; filename=\"F_chse _1_.mp4\"; filename*=UTF-8''F%C3%BCchse%20%221%22.mp4"
        )


def test_a_link_opens_one_object_only(in_s3):
    in_s3.put_bytes(b"1", "one", content_type="text/plain")
    in_s3.put_bytes(b"2", "two", content_type="text/plain")
    link = in_s3.presign("one", seconds=60)
    with pytest.raises(urllib.error.HTTPError) as refused:
        _open(link.replace("/one?", "/two?"))
    refused.value.close()
    assert refused.value.code == 403


def test_links_point_to_the_public_endpoint_and_everything_else_does_not(s3):
    values = settings.Settings(**{**s3, "S3_PUBLIC_ENDPOINT_URL": "https://videos.example:8443"})
    store = stores.open_store(values)
    store.check()
    bucket_and_prefix = s3["RUSHES_RESULTS_URL"].removeprefix("s3://")
    link = store.presign("a.mp4", seconds=60)
    assert link.startswith(f"https://videos.example:8443/{bucket_and_prefix}/a.mp4?")
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link


def test_a_bucket_without_prefix_is_a_store(s3):
    values = settings.Settings(**{**s3, "RUSHES_RESULTS_URL": f"s3://{servers.BUCKET}/"})
    store = stores.open_store(values)
    assert store.url == f"s3://{servers.BUCKET}"
    store.put_bytes(b"x", "top-level", content_type="text/plain")
    assert "top-level" in list(store.list("top"))
    store.delete("top-level")


def test_more_than_a_page_is_listed(tmp_path):
    folder = tmp_path / "s3" / "buckets" / "rushes" / "many"
    folder.mkdir(parents=True)
    for number in range(1005):
        (folder / f"{number:04}").touch()
    with servers.S3Server.start(tmp_path / "s3") as server:
        store = stores.open_store(settings.Settings(**server.environment()))
        assert list(store.list("many/")) == [f"many/{number:04}" for number in range(1005)]


def test_a_store_that_forgot_its_metadata_still_has_heads(tmp_path):
    with servers.S3Server.start(tmp_path / "s3") as server:
        store = stores.open_store(settings.Settings(**server.environment()))
        store.put_bytes(VIDEO, "v.mp4", content_type="video/mp4")
    with servers.S3Server.start(tmp_path / "s3"):
        assert store.head("v.mp4") == storage.ObjectHead(
            key="v.mp4", size_bytes=len(VIDEO), sha256=None
        )


def test_wrong_keys_are_denied(s3):
    values = settings.Settings(**{**s3, "AWS_SECRET_ACCESS_KEY": "wrong"})
    store = stores.open_store(values)
    for call in (
        store.check,
        lambda: list(store.list()),
        lambda: store.put_bytes(b"x", "k", content_type="text/plain"),
        lambda: store.read_bytes("k"),
        lambda: store.head("k"),
    ):
        with pytest.raises(storage.StorageDenied, match=r"403.*AWS_SECRET_ACCESS_KEY") as denied:
            call()
        assert "wrong" not in str(denied.value)


def test_no_keys_at_all_are_denied(monkeypatch):
    store = stores.open_store(settings.load(results_url="s3://bucket"))
    with pytest.raises(storage.StorageDenied, match="locate credentials"):
        store.check()


def test_a_missing_bucket_is_denied_and_says_so(s3):
    store = stores.open_store(settings.Settings(**{**s3, "RUSHES_RESULTS_URL": "s3://not-there"}))
    with pytest.raises(storage.StorageDenied, match="create the bucket 'not-there'"):
        store.check()
    with pytest.raises(storage.StorageDenied):
        store.put_bytes(b"x", "k", content_type="text/plain")


def test_a_store_that_is_down_is_unavailable_and_works_again_later(tmp_path):
    with servers.S3Server.start(tmp_path / "s3") as server:
        store = stores.open_store(settings.Settings(**server.environment()))
        store.put_bytes(b"x", "k", content_type="text/plain")
        server.kill()
        for call in (store.check, lambda: store.read_bytes("k"), lambda: store.head("k")):
            with pytest.raises(storage.StorageUnavailable, match="does not answer"):
                call()
    with servers.S3Server.start(tmp_path / "s3"):
        assert store.read_bytes("k") == b"x"


def test_a_store_that_accepts_and_says_nothing_is_given_up(s3, monkeypatch):
    monkeypatch.setattr(s3_clients, "READ_SECONDS", 0.2)
    monkeypatch.setattr(s3_clients, "MAX_TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        values = settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint})
        with pytest.raises(storage.StorageUnavailable, match="timeout"):
            stores.open_store(values).check()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("503 SlowDown", storage.StorageUnavailable),
        ("500 InternalError", storage.StorageUnavailable),
        ("429 TooManyRequests", storage.StorageUnavailable),
        ("507 StorageFull", storage.StorageUnavailable),
        ("403 AccessDenied", storage.StorageDenied),
        ("403 RequestTimeTooSkewed", storage.KeysRefused),
        ("400 ExpiredToken", storage.KeysRefused),
        ("400 BadDigest", storage.UploadMismatch),
        ("400 EntityTooLarge", storage.StorageError),
        ("501 NotImplemented", storage.StorageError),
    ],
)
def test_each_refusal_of_an_upload_has_its_class(s3, monkeypatch, answer, kind):
    monkeypatch.setattr(s3_clients, "MAX_TRIES", 1)
    with _server_that_always_says(answer) as endpoint:
        values = settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint})
        with pytest.raises(storage.StorageError) as raised:
            stores.open_store(values).put_bytes(b"x", "k", content_type="text/plain")
    assert type(raised.value) is kind


def test_the_words_of_the_store_are_passed_on_with_what_would_do(s3):
    with _server_that_always_says("403 SecondLevelDomainForbidden") as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(storage.StorageDenied, match="said so; set S3_ADDRESSING_STYLE=virtual"):
            store.put_bytes(b"x", "k", content_type="text/plain")


def test_a_store_may_have_the_bucket_in_the_name_of_its_host(s3):
    values = settings.Settings(**{**s3, "S3_ADDRESSING_STYLE": "virtual"})
    its = {"s3_endpoint_url": "https://oss.example", "s3_public_endpoint_url": None}
    values = values.model_copy(update=its)
    link = urllib.parse.urlsplit(stores.open_bucket(values, "mine").presign("k", seconds=60))
    assert (link.hostname, link.path) == ("mine.oss.example", "/k")


def test_links_of_aws_lead_to_the_host_of_the_region(monkeypatch, tmp_path):
    keys = {"aws_access_key_id": "A", "aws_secret_access_key": "S"}

    def host(bucket):
        values = settings.load(results_url=f"s3://{bucket}", aws_region="eu-south-1", **keys)
        return urllib.parse.urlsplit(stores.open_store(values).presign("k", seconds=60)).netloc

    assert host("mine") == "mine.s3.eu-south-1.amazonaws.com"
    assert host("my.own") == "s3.eu-south-1.amazonaws.com", "a certificate is for one name"
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://minio.example:9000\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert host("mine") == "minio.example:9000"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"<Error><Code>NoSuchKey</Code><Message>said so</Message></Error>"),
        ({"Content-Type": "application/xml"}, b"<Error><Message>said so</Message></Error>"),
        ({"Content-Type": "text/html"}, b""),
        ({}, b""),
    ],
)
def test_what_is_gone_already_may_be_deleted_again_where_that_is_a_404(s3, headers, body):
    with _s3_that(lambda _: (404, headers, body)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        store.delete("k")
        store.delete_many(["k"])


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_store_that_redirects_is_denied_and_not_asked_for_ever(s3, status):
    asked = []

    def answer(request):
        asked.append(request.command)
        return status, {"Location": "https://me:secret@s3.example/x?secret=1"}, b""

    with _s3_that(answer) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        told = "redirects to https://s3.example/x: correct AWS_ENDPOINT_URL_S3"
        for call in (
            store.check,
            lambda: store.put_bytes(b"x", "k", content_type="text/plain"),
            lambda: store.head("k"),
            lambda: store.delete("k"),
        ):
            with pytest.raises(storage.StorageDenied, match=told):
                call()
    assert len(asked) <= 10


def test_what_boto3_never_foresaw_is_an_error_of_the_store(in_s3, monkeypatch):
    def meet_a_defect(**_):
        raise RecursionError("too deep")

    monkeypatch.setattr(in_s3._client, "list_objects_v2", meet_a_defect)
    with pytest.raises(storage.StorageError, match="RecursionError: too deep"):
        in_s3.check()


def test_credentials_that_come_late_or_are_renewed_are_taken_up(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(s3_store, "RENEW_SECONDS", 0)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    valid = "first"

    def answer(request):
        if request.headers.get("X-Amz-Security-Token") == valid:
            return 200, {}, b"<ListBucketResult/>"
        return 400, {}, _refusal("ExpiredToken")

    with _s3_that(answer) as endpoint:
        store = stores.open_store(_without_keys(s3, endpoint))
        with pytest.raises(storage.StorageDenied, match="locate credentials"):
            store.check()
        _write_credentials(tmp_path / "credentials", token="first")
        store.check()
        valid = "second"
        with pytest.raises(storage.StorageDenied, match="renew them where boto3 finds them"):
            store.check()
        _write_credentials(tmp_path / "credentials", token="second")
        store.check()


def test_other_credentials_are_looked_for_every_few_seconds_at_most(monkeypatch):
    made = []
    monkeypatch.setattr(s3_store, "RENEW_SECONDS", 600)
    monkeypatch.setattr(s3_clients, "make", _counted(s3_clients.make, made))
    store = stores.open_store(settings.load(results_url="s3://bucket"))
    for _ in range(4):
        with pytest.raises(storage.StorageDenied):
            store.check()
    assert len(made) == 2


def test_a_token_of_the_settings_that_ended_says_what_to_restart(s3, monkeypatch):
    made = []
    monkeypatch.setattr(s3_clients, "make", _counted(s3_clients.make, made))
    with _server_that_always_says("400 TokenRefreshRequired") as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        for _ in range(2):
            with pytest.raises(storage.StorageDenied, match=r"AWS_SESSION_TOKEN, and restart"):
                store.put_bytes(b"x", "k", content_type="text/plain")
    assert len(made) == 1


@pytest.mark.parametrize("size_bytes", [0, 7])
def test_a_head_without_a_size_is_completed_by_a_look_at_the_object(s3, size_bytes):
    def answer(request):
        if request.command == "HEAD":
            return 200, {"Transfer-Encoding": "chunked", "x-amz-meta-sha256": "s"}, None
        if size_bytes == 0:
            return 416, {}, _refusal("InvalidRange")
        assert request.headers["Range"] == "bytes=0-0"
        return 206, {"Content-Range": f"bytes 0-0/{size_bytes}"}, b"x"

    with _s3_that(answer) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        head = storage.ObjectHead(key="k", size_bytes=size_bytes, sha256="s")
        assert store.head("k") == head


def test_a_store_that_tells_no_size_at_all_says_so(s3):
    def answer(request):
        is_head = request.command == "HEAD"
        return 200, {"Transfer-Encoding": "chunked"} if is_head else {}, None if is_head else b"x"

    with _s3_that(answer) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(storage.StorageError, match="tells no size of its objects"):
            store.head("k")


def test_a_part_of_an_object_is_that_part_where_the_store_gives_all_of_it(s3):
    with _s3_that(lambda _: (200, {}, VIDEO)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        for first, last in ((0, 9), (5, 9), (storage.CHUNK_BYTES + 3, storage.CHUNK_BYTES + 9)):
            got = b"".join(store.stream("k", first=first, last=last))
            assert got == VIDEO[first : last + 1]


def test_a_whole_object_that_breaks_off_before_the_part_is_closed(s3, monkeypatch):
    closed = []
    close = StreamingBody.close

    def cut(_body, _size=None):
        raise ResponseStreamingError(error="cut")

    def note(body):
        closed.append(body)
        close(body)

    with _s3_that(lambda _: (200, {}, VIDEO)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        monkeypatch.setattr(StreamingBody, "read", cut)
        monkeypatch.setattr(StreamingBody, "close", note)
        with pytest.raises(storage.BrokenOff):
            store.stream("k", first=5, last=9)
    assert len(closed) == 1


def test_one_object_that_is_locked_keeps_none_of_the_others(s3):
    deleted = []

    def answer(request):
        if request.command == "POST":
            return 501, {}, _refusal("NotImplemented")
        if request.path.endswith("/b"):
            return 403, {}, _refusal("AccessDenied")
        deleted.append(request.path[-1])
        return 204, {}, b""

    with _s3_that(answer) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(storage.StorageDenied, match=r"/b: .*s3:DeleteObject"):
            store.delete_many(["a", "b", "c"])
    assert deleted == ["a", "c"]


def test_what_many_deletions_miss_is_gone(s3):
    gone = b"<DeleteResult><Error><Key>k</Key><Code>NoSuchKey</Code></Error></DeleteResult>"
    with _s3_that(lambda _: (200, {}, gone)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        store.delete_many(["k"])


def test_names_that_others_gave_are_deleted_as_they_were_listed(s3):
    """Such as `inputs/`, with which consoles mark a folder."""
    names = ["inputs/", "inputs//x", "inputs/a\\b"]
    listed = "".join(
        f"<Contents><Key>pre/{name}</Key><Size>0</Size>"
        "<LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
        for name in names
    )
    asked = []

    def answer(request):
        if request.command == "GET":
            return 200, {}, f"<ListBucketResult>{listed}</ListBucketResult>".encode()
        asked.append(request.body.decode())
        return 200, {}, b"<DeleteResult/>"

    with _s3_that(answer) as endpoint:
        its = {"AWS_ENDPOINT_URL_S3": endpoint, "RUSHES_RESULTS_URL": "s3://bucket/pre"}
        store = stores.open_store(settings.Settings(**{**s3, **its}))
        store.delete_many(list(store.list("inputs/")))
    assert all(f"<Key>pre/{name}</Key>" in asked[0] for name in names)


@pytest.mark.parametrize(
    ("content_type", "page"),
    [
        ("text/html; charset=utf-8", b"<html><body>404 page not found<br></body></html>"),
        ("text/html", b"<html><body>404 page not found</body></html>"),
        ("text/plain; charset=utf-8", b"404 page not found"),
    ],
)
def test_a_web_page_that_is_not_found_is_no_missing_object(s3, content_type, page):
    with _s3_that(lambda _: (404, {"Content-Type": content_type}, page)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        for call in (
            store.check,
            lambda: list(store.list()),
            lambda: store.put_bytes(b"x", "k", content_type="text/plain"),
            lambda: store.read_bytes("k"),
            lambda: store.delete("k"),
            lambda: store.delete_many(["k"]),
        ):
            with pytest.raises(storage.StorageDenied, match="there is no S3 at this endpoint"):
                call()


def test_a_listing_of_the_first_page_alone_is_none(s3):
    page = (
        b"<ListBucketResult><IsTruncated>true</IsTruncated><NextMarker>a</NextMarker><Contents>"
        b"<Key>a</Key><Size>1</Size><LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
        b"</ListBucketResult>"
    )
    with _s3_that(lambda _: (200, {}, page)) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(storage.StorageError, match="does not know ListObjectsV2"):
            next(store.entries())


@pytest.mark.parametrize(
    ("bare", "of_listing", "told"),
    [
        (400, (400, "ExpiredToken"), "ExpiredToken: said so; correct or renew"),
        (400, (400, "AuthorizationHeaderMalformed"), "set AWS_REGION"),
        (403, (403, "AccessDenied"), "s3:ListBucket; without it what is missing looks refused"),
        (403, (200, ""), "s3:GetObject; without s3:ListBucket what is missing looks refused"),
    ],
)
def test_a_head_that_is_refused_has_the_words_of_a_listing(s3, bare, of_listing, told):
    def answer(request):
        if request.command == "HEAD":
            return bare, {}, b""
        status, code = of_listing
        return status, {}, _refusal(code) if code else b"<ListBucketResult/>"

    with _s3_that(answer) as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(
            storage.StorageDenied, match=rf"^{re.escape(store.address('k'))}: .*{told}"
        ):
            store.head("k")


def test_an_object_that_may_not_be_read_says_which_rights_may_be_missing(s3):
    told = "s3:GetObject; without s3:ListBucket what is missing looks refused"
    with _server_that_always_says("403 AccessDenied") as endpoint:
        store = stores.open_store(settings.Settings(**{**s3, "AWS_ENDPOINT_URL_S3": endpoint}))
        with pytest.raises(storage.StorageDenied, match=told):
            store.read_bytes("k")


def test_credentials_that_are_away_for_a_moment_are_an_outage(monkeypatch, tmp_path, video):
    """And no fault of this disk, for which a finished video would be rendered again."""
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
    store = stores.open_store(settings.load(results_url="s3://bucket"))
    for call in (
        lambda: store.put_file(video, "k", content_type="video/mp4"),
        lambda: store.download("k", tmp_path / "there"),
        lambda: store.head("k"),
    ):
        with pytest.raises(storage.StorageUnavailable, match="token"):
            call()


def test_a_disk_that_takes_no_download_is_no_fault_of_the_store(in_s3, tmp_path):
    in_s3.put_bytes(b"x", "k", content_type="text/plain")
    with pytest.raises(FileNotFoundError):
        in_s3.download("k", tmp_path / "not there" / "file")


def test_a_body_that_breaks_off_is_an_outage(in_s3, monkeypatch, tmp_path):
    in_s3.put_bytes(b"x" * 10, "k", content_type="text/plain")

    def cut(_body, _size=None):
        raise ResponseStreamingError(error="reset")

    monkeypatch.setattr(StreamingBody, "read", cut)
    for call in (
        lambda: in_s3.download("k", tmp_path / "file"),
        lambda: list(in_s3.stream("k", first=0, last=9)),
    ):
        with pytest.raises(storage.BrokenOff, match=r"broke off: .*reset"):
            call()
    with pytest.raises(storage.StorageUnavailable, match=r"does not answer: .*reset"):
        in_s3.read_bytes("k")


def test_bytes_that_change_on_their_way_are_refused(in_s3, monkeypatch):
    monkeypatch.setattr(s3_store, "_base64_of", lambda _: "AAAAAAAAAAAAAAAAAAAAAA==")
    with pytest.raises(storage.UploadMismatch) as raised:
        in_s3.put_bytes(b"sent", "k", content_type="text/plain")
    assert raised.value.key == "k"
    assert raised.value.sent_bytes == 4
    assert raised.value.stored_bytes is None
    assert in_s3.head("k") is None


def test_an_object_of_another_size_is_a_mismatch(in_s3, monkeypatch):
    head = storage.ObjectHead(key="k", size_bytes=3, sha256=None)
    monkeypatch.setattr(in_s3, "head", lambda _: head)
    with pytest.raises(storage.UploadMismatch, match=r"sent 4 bytes.*has 3 bytes") as raised:
        in_s3.put_bytes(b"sent", "k", content_type="text/plain")
    assert raised.value.stored_bytes == 3


def test_a_proxy_is_not_asked_for_a_store_on_this_machine(s3, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{servers.free_port()}")
    monkeypatch.delenv("NO_PROXY")
    stores.open_store(settings.Settings(**s3)).check()


def test_settings_beat_keys_in_the_environment(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of-another-store")
    stores.open_store(settings.Settings(**s3)).check()


# Folder


def test_objects_are_plain_files(in_folder, tmp_path):
    in_folder.put_bytes(b"x", "batches/1/video.mp4", content_type="video/mp4")
    path = tmp_path / "results" / "batches" / "1" / "video.mp4"
    assert path.read_bytes() == b"x"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert in_folder.presign("batches/1/video.mp4", seconds=1) == path.as_uri()


def test_a_full_disk_is_unavailable_and_leaves_nothing(in_folder, monkeypatch, tmp_path):
    in_folder.put_bytes(b"old", "k", content_type="text/plain")

    def no_space(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_store.os, "fsync", no_space)
    with pytest.raises(storage.StorageUnavailable, match="No space left"):
        in_folder.put_bytes(b"new", "k", content_type="text/plain")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["k"]
    assert in_folder.read_bytes("k") == b"old"


def test_unfinished_files_are_not_listed(in_folder, tmp_path):
    in_folder.put_bytes(b"x", "a/k", content_type="text/plain")
    (tmp_path / "results" / "a" / f"{storage.PART_PREFIX}1234").touch()
    assert list(in_folder.list()) == ["a/k"]


def test_a_key_below_an_object_is_refused(in_folder):
    in_folder.put_bytes(b"x", "a/k", content_type="text/plain")
    for key in ("a/k/below", "a"):
        with pytest.raises(storage.StorageError, match="a file and a folder"):
            in_folder.put_bytes(b"x", key, content_type="text/plain")
    in_folder.delete("a")
    in_folder.delete("a/k/below")
    assert list(in_folder.list()) == ["a/k"]


def test_a_file_in_place_of_the_folder_is_denied(tmp_path):
    (tmp_path / "results").touch()
    with pytest.raises(storage.StorageDenied, match="a folder is needed"):
        folder_store.FolderStore(tmp_path / "results").check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_denied(tmp_path):
    tmp_path.chmod(0o500)
    store = folder_store.FolderStore(tmp_path / "results")
    with pytest.raises(storage.StorageDenied, match="no right to write"):
        store.check()
    with pytest.raises(storage.StorageDenied):
        store.put_bytes(b"x", "k", content_type="text/plain")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, storage.StorageDenied), (errno.EIO, storage.StorageUnavailable)],
)
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(in_folder, monkeypatch, number, kind):
    """Else `rushes gc` would call its files deleted."""
    in_folder.put_bytes(b"x", "a/b/k", content_type="text/plain")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "b":
            raise OSError(number, os.strerror(number), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(kind):
        list(in_folder.entries("a/"))
    monkeypatch.undo()
    assert list(in_folder.list("a/b/k/")) == list(in_folder.list("none/")) == []


def test_a_folder_that_was_named_and_is_not_there_is_an_outage(tmp_path):
    """Its disk is not mounted: what is written in its place would be hidden once it is."""
    folder = tmp_path / "disk" / "results"
    folder.mkdir(parents=True)
    store = stores.open_store(settings.load(results_url=folder.as_uri()))
    store.put_bytes(b"x", "a/k", content_type="text/plain")
    folder.rename(tmp_path / "unmounted")
    for call in (
        lambda: store.put_bytes(b"x", "k", content_type="text/plain"),
        lambda: store.put_bytes(b"x", "a/k", content_type="text/plain"),
        lambda: store.read_bytes("a/k"),
        lambda: store.head("a/k"),
        lambda: list(store.entries("a/")),
        lambda: store.delete("a/k"),
        lambda: store.stream("a/k", first=0, last=0),
        store.check,
    ):
        with pytest.raises(storage.StorageUnavailable, match=r"results: .*mount its disk"):
            call()
    assert list((tmp_path / "disk").iterdir()) == []
    (tmp_path / "unmounted").rename(folder)
    assert store.read_bytes("a/k") == b"x"


def test_a_folder_in_home_is_made():
    values = settings.load()
    store = stores.open_store(values)
    store.check()
    assert store.head("k") is None
    store.put_bytes(b"x", "k", content_type="text/plain")
    assert (values.home / settings.LOCAL_RESULTS / "k").read_bytes() == b"x"


# URLs and settings


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("results", "got 'results'"),
        ("http://host/bucket", "got 'http://host/bucket'"),
        ("s3://", "no bucket name"),
        ("s3:///prefix", "no bucket name"),
        ("s3://a", "no bucket name"),
        ("s3://bucket?x=1", "no `\\?`"),
        ("file://results", "three slashes"),
        ("file:results", "three slashes"),
        ("file:///", "the root of the machine"),
    ],
)
def test_a_bad_url_says_what_would_do(url, problem):
    with pytest.raises(errors.InvalidInput, match=f"s3://bucket/prefix.*{problem}"):
        stores.open_store(settings.load(results_url=url))


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(errors.InvalidInput) as raised:
        stores.open_store(settings.load(results_url="s3://key:hunter2@bucket/x"))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("prefix", ["a/../b", "a//b", "a\\b"])
def test_a_prefix_obeys_the_rules_of_keys(prefix):
    with pytest.raises(errors.InvalidInput):
        stores.open_store(settings.load(results_url=f"s3://bucket/{prefix}"))


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("s3_endpoint_url", "AWS_ENDPOINT_URL_S3"),
        ("s3_public_endpoint_url", "S3_PUBLIC_ENDPOINT_URL"),
    ],
)
def test_an_endpoint_needs_a_scheme(field, name):
    with pytest.raises(errors.InvalidInput, match=f"{name}: must be http://host:port"):
        stores.open_store(settings.load(results_url="s3://bucket", **{field: "127.0.0.1:9000"}))


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read_are_a_wrong_setting(tmp_path, content):
    bundle = tmp_path / "ca.pem"
    if content is not None:
        bundle.write_text(content)
    keys = {"aws_access_key_id": "A", "aws_secret_access_key": "S", "aws_ca_bundle": str(bundle)}
    with pytest.raises(errors.InvalidInput, match=r"AWS_CA_BUNDLE=/.*ca\.pem: no file of cert"):
        stores.open_store(settings.load(results_url="s3://bucket", **keys))
    plain = {"s3_endpoint_url": "http://127.0.0.1:1"}
    stores.open_store(settings.load(results_url="s3://bucket", **keys, **plain))


def test_half_a_pair_of_keys_is_refused():
    values = settings.load(results_url="s3://bucket", aws_access_key_id="AKIA123")
    with pytest.raises(errors.InvalidInput, match="belong together"):
        stores.open_store(values)


def test_the_default_store_is_a_folder_in_home():
    values = settings.load()
    assert stores.open_store(values).url == (values.home / settings.LOCAL_RESULTS).as_uri()


def test_importing_storage_does_not_import_boto3():
    code = "import sys, jobs.stores; sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_paths_with_spaces_and_umlauts_are_folders(tmp_path):
    folder = Path(tmp_path / "Väter & Söhne 100%")
    folder.mkdir()
    store = stores.open_store(settings.load(results_url=folder.as_uri()))
    store.put_bytes(b"x", "k", content_type="text/plain")
    assert (folder / "k").read_bytes() == b"x"


def _open(link):
    return urllib.request.urlopen(link)  # noqa: S310  # a link of our own making


@contextlib.contextmanager
def _server_that_always_says(answer):
    """The address of an S3 server with one opinion."""
    status, _, code = answer.partition(" ")
    body = f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # knows `Expect: 100-continue`

        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.do_HEAD()
            self.wfile.write(body)

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(body)

        do_DELETE = do_GET  # noqa: N815  # a name of http.server

        def do_POST(self):
            self.do_PUT()

        def do_HEAD(self):
            self.send_response(int(status))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

        def log_message(self, *_arguments):
            pass

    with _served(Handler) as address:
        yield address


@contextlib.contextmanager
def _served(handler):
    """The address of a server of it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _s3_that(answer):
    """The address of a server; `answer(request)` gives status, headers and body (None: none)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if body is not None:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815  # names of http.server

        def log_message(self, *_arguments):
            pass

    with _served(Handler) as address:
        yield address


def _refusal(code):
    return f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode()


def _without_keys(s3, endpoint):
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    rest = {name: value for name, value in s3.items() if name not in names}
    return settings.Settings(**{**rest, "AWS_ENDPOINT_URL_S3": endpoint})


def _write_credentials(path, *, token):
    keys = {"aws_access_key_id": "A", "aws_secret_access_key": "S", "aws_session_token": token}
    lines = [f"{name} = {value}" for name, value in keys.items()]
    path.write_text("\n".join(["[default]", *lines]))


def _counted(make, made):
    """The same, with a list of its calls."""

    def counted(options):
        made.append(options)
        return make(options)

    return counted


def test_what_boto3_refuses_is_a_wrong_setting(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(errors.InvalidInput, match=r"object store: .*nope"):
        stores.open_store(settings.load(results_url="s3://bucket"))
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://min_io:9000")
    with pytest.raises(errors.InvalidInput, match="object store: Invalid endpoint"):
        stores.open_store(settings.load(results_url="s3://bucket"))
