"""The results store: it is the farm's, and takes, tells and gives what we put."""

import contextlib
import hashlib
import secrets
import ssl
import time
import urllib.error
from collections.abc import Iterator
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError

from jobs import database, direct, errors, settings, storage, store_mark, stores
from jobs.doctor import checks

OBJECT_BYTES = 100_000
LINK_SECONDS = 60


def check(config: settings.Settings) -> Iterator[checks.Check]:
    try:
        store = stores.open_store(config)
        yield from _round_trip(store, config)
    except storage.StorageDenied as error:
        advice = "correct keys, rights or RUSHES_RESULTS_URL"
        if "RequestTimeTooSkewed" in str(error):
            advice = "run NTP on this machine: the store takes nothing from a wrong clock"
        yield checks.fail("results store", str(error), advice)
    except errors.InvalidInput as error:
        yield checks.fail(
            "results store", str(error), "correct these values; docs/configuration.md"
        )
    except errors.RushesError as error:
        yield checks.fail("results store", str(error), _advice_on(str(error)))


def _advice_on(problem: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in problem:
        return NOT_TRUSTED
    if "WRONG_VERSION_NUMBER" in problem:  # in the words of OpenSSL
        return "nothing speaks TLS there: correct AWS_ENDPOINT_URL_S3, perhaps to http://"
    return "start the store or correct RUSHES_RESULTS_URL"


def _round_trip(store: storage.ObjectStore, config: settings.Settings) -> Iterator[checks.Check]:
    key = f"doctor/{secrets.token_hex(8)}.bin"
    content = secrets.token_bytes(OBJECT_BYTES)
    sha256 = hashlib.sha256(content).hexdigest()
    began = time.monotonic()
    try:
        store.put_bytes(content, key, content_type="application/octet-stream")
        head = store.head(key)
        fetched = store.read_bytes(key)
        seconds = time.monotonic() - began
        if head is None or head.size_bytes != OBJECT_BYTES or fetched != content:
            seen = f"{store.url}: what was put is not what is there"
            yield checks.fail("results store", seen, "do not use this store: it changes objects")
        else:
            seen = f"{store.url}: put, head and get of 100 kB in {seconds:.2f} s, sha256 right"
            yield checks.ok("results store", seen)
        if head is not None and head.sha256 is None:
            advice = (
                "none needed: sizes are compared, and videos carry their sha256 in the database"
            )
            yield checks.warn("results checksums", "the store keeps no sha256 metadata", advice)
        yield from _farm(config, store)
        yield _listing(store, key)
        yield from _versions(store)
        yield _link(store, key, sha256, config)
    finally:
        with contextlib.suppress(errors.RushesError):
            store.delete(key)
    # Without s3:ListBucket, what is gone looks refused.
    with contextlib.suppress(storage.StorageDenied):
        if store.head(key) is not None:
            yield checks.warn("results delete", f"{key} is still there", "allow s3:DeleteObject")


def _farm(config: settings.Settings, store: storage.ObjectStore) -> Iterator[checks.Check]:
    """Whether it is the one that the other processes use."""
    try:
        db = database.connect(config)
        if db.missing_file is None:
            with contextlib.closing(db):
                store_mark.Guard(db, store).require()
    except store_mark.OtherStore as error:
        yield checks.fail("results store of the farm", str(error), OTHER_STORE)
    except (SQLAlchemyError, errors.RushesError):
        pass  # the checks of these two say it


OTHER_STORE = (
    "correct RUSHES_RESULTS_URL or AWS_ENDPOINT_URL_S3; if the farm moves to this store, "
    "`rushes migrate --store`"
)


def _listing(store: storage.ObjectStore, key: str) -> checks.Check:
    advice = "allow s3:ListBucket (on the bucket)"
    try:
        if key in store.list("doctor/"):
            return checks.ok("results listing", "a new object shows up")
    except storage.StorageDenied as error:
        return checks.fail("results listing", str(error), advice)
    return checks.warn("results listing", "a new object does not show up", advice)


def _versions(store: storage.ObjectStore) -> Iterator[checks.Check]:
    with contextlib.suppress(errors.RushesError):  # a right that few have, and few stores know it
        if store.keeps_versions():
            seen = "the bucket keeps versions: what `rushes gc` deletes stays, and is paid for"
            yield checks.warn(
                "results versions", seen, "add a lifecycle rule for noncurrent versions"
            )


def _link(
    store: storage.ObjectStore, key: str, sha256: str, config: settings.Settings
) -> checks.Check:
    link = store.presign(key, seconds=LINK_SECONDS)
    parts = urlsplit(link)
    where = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in ("http", "https"):
        return checks.ok("results links", "files of this machine: no links needed")
    advice = "S3_PUBLIC_ENDPOINT_URL must be the store's address as readers reach it"
    if config.s3_endpoint_url is None:
        advice = "set AWS_REGION to the region of the bucket: links are signed for it"
    try:
        with direct.opened(link, seconds=10, tls=_trust(config)) as answer:
            content = answer.read(OBJECT_BYTES + 1)
    except urllib.error.HTTPError as error:
        return checks.fail("results links", f"{where} answers {error.code}", advice)
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            advice = NOT_TRUSTED
        return checks.fail("results links", f"{where}: {error}", advice)
    if hashlib.sha256(content).hexdigest() != sha256:
        return checks.fail("results links", f"{where} gives other bytes", advice)
    if "X-Amz-Security-Token" in parts.query:
        seen = f"a presigned link works: {where}, until the temporary credentials end, within hours"
        return checks.warn("results links", seen, "for links that live longer, give lasting keys")
    return checks.ok("results links", f"a presigned link works: {where}")


def _trust(config: settings.Settings) -> ssl.SSLContext:
    """As this machine trusts, and as we trust the store."""
    trust = ssl.create_default_context()
    if config.aws_ca_bundle is not None:
        trust.load_verify_locations(config.aws_ca_bundle)
    return trust


NOT_TRUSTED = (
    "AWS_CA_BUNDLE must name the file of its authority, which readers have to trust too; or "
    "correct the certificate, or S3_PUBLIC_ENDPOINT_URL"
)
