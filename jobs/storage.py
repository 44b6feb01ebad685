"""Where finished videos and manifests lie: one store under one URL, S3-compatible or a folder.

Keys are relative to the URL. `put_*` overwrites; who writes which key is decided in `results`.
"""

import base64
import binascii
import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol

from jobs import errors, settings

if TYPE_CHECKING:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import PutObjectRequestTypeDef

CONNECT_SECONDS = 5
READ_SECONDS = 60
MAX_TRIES = 3  # inside one call; waiting out an outage is the caller's business
MAX_LINK_SECONDS = 7 * 24 * 3600  # longest life of a SigV4 link
CHUNK_BYTES = 1 << 20
MOST_DELETED_AT_ONCE = 1_000  # what one DeleteObjects takes
PART_PREFIX = ".rushes-part-"  # unfinished files in a folder store
RESERVED_PREFIXES = (PART_PREFIX, ".rclone_temp_")  # rclone hides the latter from listings

DENIED_CODES = {
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "Forbidden",
    "IllegalLocationConstraintException",
    "InvalidAccessKeyId",
    "InvalidBucketName",
    "InvalidToken",
    "NoSuchBucket",
    "PermanentRedirect",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
BUSY_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
DIGEST_CODES = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}


class StorageError(errors.RushesError):
    """The store did not do what was asked, and neither waiting nor other keys will change that."""

    def __init__(self, address: str, message: str) -> None:
        self.address = address
        super().__init__(f"{address}: {message}")


class StorageUnavailable(StorageError):
    """The store is out of reach, overloaded or full: the same call may work later."""


class StorageDenied(StorageError):
    """The store refuses us or has no such bucket: someone must change keys, rights or the URL."""


class ObjectMissing(StorageError):
    """No object under this key."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "no such object")


class UploadMismatch(StorageError):
    """The stored object differs from what was sent; `stored_bytes` None: the store refused it."""

    def __init__(
        self,
        address: str,
        *,
        key: str,
        sent_bytes: int,
        stored_bytes: int | None,
        sent_sha256: str,
        stored_sha256: str | None,
    ) -> None:
        self.key = key
        self.sent_bytes = sent_bytes
        self.stored_bytes = stored_bytes
        self.sent_sha256 = sent_sha256
        self.stored_sha256 = stored_sha256
        stored = (
            "the store refused it as damaged"
            if stored_bytes is None
            else f"the store has {stored_bytes} bytes, sha256 {stored_sha256 or 'unknown'}"
        )
        super().__init__(
            address,
            f"upload differs: sent {sent_bytes} bytes, sha256 {sent_sha256}; {stored}; "
            "send it again",
        )


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """What a `put` left in the store, verified."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ObjectHead:
    """What the store knows about an object; `sha256` only if it kept what our upload told it."""

    key: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectEntry:
    """A line of a listing."""

    key: str
    size_bytes: int
    modified_at: datetime
    """By the clock of the store."""


class ObjectStore(Protocol):
    """May be used by several threads at once. Every method raises `StorageError` or its kinds."""

    @property
    def url(self) -> str: ...

    def put_file(self, path: Path, key: str, *, content_type: str) -> StoredObject: ...

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> StoredObject: ...

    def read_bytes(self, key: str) -> bytes: ...

    def stream(self, key: str, *, first: int, last: int) -> Iterator[bytes]:
        """Bytes `first` to `last`, that one included. What cannot be read is told by this call."""

    def download(self, key: str, path: Path) -> None:
        """Whole or not at all: `path` appears when the last byte is there."""

    def head(self, key: str) -> ObjectHead | None: ...

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """Objects whose keys start with the prefix, in order; `b/7` finds `b/77/x` too."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Their keys."""

    def delete(self, key: str) -> None:
        """Safe to call twice."""

    def delete_many(self, keys: Sequence[str]) -> None:
        """The same for at most MOST_DELETED_AT_ONCE. After an error, some may be gone."""

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:
        """A link for readers without keys; with a file name, browsers save instead of play."""

    def address(self, key: str) -> str: ...

    def check(self) -> None:
        """Raise unless the store answers and knows us. Creates nothing."""


def open_store(values: settings.Settings) -> ObjectStore:
    """The store at `results_url`. Connects on first use, so it opens while the store is down."""
    url = values.results_url
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        return FolderStore(_folder_of(parts))
    if parts.scheme == "s3":
        bucket, prefix = _bucket_of(parts)
        return S3Store(bucket, prefix, options=_options(values))
    raise _bad_url(f"got {_shown(parts)}")


@functools.lru_cache(maxsize=8)  # a client takes a tenth of a second to make
def open_bucket(values: settings.Settings, bucket: str) -> ObjectStore:
    """Any bucket, with the keys and at the endpoint of the results."""
    return open_store(values.model_copy(update={"results_url": f"s3://{bucket}"}))


class FolderStore:
    """Objects as plain files below one folder; their content type is the file name's business."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def url(self) -> str:
        return self._folder.as_uri()

    def put_file(self, path: Path, key: str, *, content_type: str) -> StoredObject:  # noqa: ARG002
        with path.open("rb") as source:
            return self._put(source, key)

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> StoredObject:  # noqa: ARG002
        return self._put(io.BytesIO(data), key)

    def read_bytes(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def stream(self, key: str, *, first: int, last: int) -> Iterator[bytes]:
        with self._translated(key):
            source = self._path(key).open("rb")
            source.seek(first)
        return _chunks(source, last - first + 1)

    def download(self, key: str, path: Path) -> None:
        with contextlib.ExitStack() as stack:
            with self._translated(key):
                source = stack.enter_context(self._path(key).open("rb"))
            _write_whole(source, path)

    def head(self, key: str) -> ObjectHead | None:
        try:
            with self._translated(key), self._path(key).open("rb") as source:
                digest = _digest(source)
        except ObjectMissing:
            return None
        return ObjectHead(key=key, size_bytes=digest.size_bytes, sha256=digest.sha256)

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        _check_prefix(prefix)
        top = self._folder / prefix.rpartition("/")[0]
        keys = [
            (Path(folder) / name).relative_to(self._folder).as_posix()
            for folder, _, names in os.walk(top)
            for name in names
            if not name.startswith(PART_PREFIX)
        ]
        for key in sorted(key for key in keys if key.startswith(prefix)):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found = (self._folder / key).stat()
                yield ObjectEntry(
                    key=key,
                    size_bytes=found.st_size,
                    modified_at=datetime.fromtimestamp(found.st_mtime, UTC),
                )

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectMissing), self._translated(key):
            path.unlink()
        with contextlib.suppress(OSError):  # the first one that still holds something
            for folder in path.parents[: key.count("/")]:
                folder.rmdir()

    def delete_many(self, keys: Sequence[str]) -> None:
        assert len(keys) <= MOST_DELETED_AT_ONCE
        for key in keys:
            self.delete(key)

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:  # noqa: ARG002
        _check_link_seconds(seconds)
        return self.address(key)

    def address(self, key: str) -> str:
        return self._path(key).as_uri()

    def check(self) -> None:
        nearest = next(p for p in (self._folder, *self._folder.parents) if p.exists())
        if not nearest.is_dir():
            raise StorageDenied(self.url, f"{nearest} is a file, a folder is needed")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StorageDenied(self.url, f"no right to write in {nearest}")

    def _put(self, source: BinaryIO, key: str) -> StoredObject:
        target = self._path(key)
        sent = _digest(source)
        source.seek(0)
        try:
            try:
                _write_below(source, target)
            except FileNotFoundError:  # a `delete` took the folder away as empty
                source.seek(0)
                _write_below(source, target)
            with target.open("rb") as written:
                stored = _digest(written)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise StorageError(self.address(key), "a file and a folder want this name") from error
        except OSError as error:
            raise _from_os_error(error, self.address(key)) from error
        if stored != sent:
            raise _mismatch(self.address(key), key, sent, stored.size_bytes, stored.sha256)
        return StoredObject(key=key, size_bytes=sent.size_bytes, sha256=sent.sha256)

    def _path(self, key: str) -> Path:
        return self._folder / _checked_key(key)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _from_os_error(error, self.address(key)) from error


class S3Store:
    """Objects in a bucket of AWS or of any S3-compatible store.

    Content-MD5 goes with every upload: each store refuses damaged bytes. The sha256 is kept as
    metadata; a store that forgets metadata (rclone, at a restart) has a head without it.
    """

    def __init__(self, bucket: str, prefix: str, *, options: "S3Options") -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._is_aws = options.endpoint_url is None
        self._endpoint = options.endpoint_url or "AWS"
        self._client, self._link_client = _clients(options)

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".removesuffix("/")

    def put_file(self, path: Path, key: str, *, content_type: str) -> StoredObject:
        with path.open("rb") as source:
            sent = _digest(source)
            source.seek(0)
            return self._put(source, key, sent, content_type)

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> StoredObject:
        return self._put(data, key, _digest_bytes(data), content_type)

    def read_bytes(self, key: str) -> bytes:
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            return answer["Body"].read()

    def stream(self, key: str, *, first: int, last: int) -> Iterator[bytes]:
        with self._translated(key):
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(key), Range=f"bytes={first}-{last}"
            )
        return _chunks(answer["Body"], last - first + 1)

    def download(self, key: str, path: Path) -> None:
        with self._translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            with contextlib.closing(answer["Body"]) as body:
                _write_whole(body, path)

    def head(self, key: str) -> ObjectHead | None:
        try:
            with self._translated(key):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
        except ObjectMissing:
            return None
        # Stores differ in the case of metadata names.
        metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
        return ObjectHead(
            key=key, size_bytes=answer["ContentLength"], sha256=metadata.get("sha256")
        )

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        _check_prefix(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._translated(prefix):
            for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectEntry(
                        key=item["Key"].removeprefix(self._prefix),
                        size_bytes=item["Size"],
                        modified_at=item["LastModified"],
                    )

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        assert len(keys) <= MOST_DELETED_AT_ONCE
        if not keys:
            return
        names = [{"Key": self._key(key)} for key in keys]
        try:
            with self._translated(keys[0]):
                answer = self._client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": names, "Quiet": True},  # type: ignore[typeddict-item]
                )
        except (StorageUnavailable, StorageDenied):
            raise
        except StorageError:
            # Not every store knows this call, or takes the checksum that boto3 sends with it.
            for key in keys:
                self.delete(key)
            return
        if refused := answer.get("Errors"):
            told = f"{refused[0].get('Code')}: {refused[0].get('Message')}"
            address = f"s3://{self._bucket}/{refused[0].get('Key')}"
            if refused[0].get("Code") in DENIED_CODES:
                raise StorageDenied(address, f"{told}; allow s3:DeleteObject")
            raise StorageUnavailable(address, f"{len(refused)} were not deleted: {told}")

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:
        _check_link_seconds(seconds)
        params = {"Bucket": self._bucket, "Key": self._key(key)}
        if file_name is not None:
            params["ResponseContentDisposition"] = _attachment(file_name)
        with self._translated(key):
            return self._link_client.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=seconds
            )

    def address(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._key(key)}"

    def check(self) -> None:
        # A listing and not HeadBucket: its refusals say why.
        with self._translated(""):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def _put(
        self, body: bytes | BinaryIO, key: str, sent: "_Digest", content_type: str
    ) -> StoredObject:
        request: PutObjectRequestTypeDef = {
            "Bucket": self._bucket,
            "Key": self._key(key),
            "Body": body,
            "ContentType": content_type,
            "ContentMD5": _base64_of(sent.md5),
            "Metadata": {"sha256": sent.sha256},
        }
        if self._is_aws:
            request["ChecksumSHA256"] = _base64_of(sent.sha256)
        with self._translated(key, sent):
            self._client.put_object(**request)
        return self._verified(key, sent)

    def _verified(self, key: str, sent: "_Digest") -> StoredObject:
        head = self.head(key)
        if head is None:
            raise _mismatch(self.address(key), key, sent, 0, None)
        if head.size_bytes != sent.size_bytes or head.sha256 not in (sent.sha256, None):
            raise _mismatch(self.address(key), key, sent, head.size_bytes, head.sha256)
        return StoredObject(key=key, size_bytes=sent.size_bytes, sha256=sent.sha256)

    def _key(self, key: str) -> str:
        return self._prefix + _checked_key(key)

    @contextlib.contextmanager
    def _translated(self, key: str, sent: "_Digest | None" = None) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        address = f"s3://{self._bucket}/{self._prefix}{key}"
        try:
            yield
        except ClientError as error:
            if sent and _code(error) in DIGEST_CODES:
                raise _mismatch(address, key, sent, None, None) from error
            raise self._from_answer(error, address) from error
        except BotoCoreError as error:
            raise self._from_silence(error, address) from error

    def _from_answer(self, error: "ClientError", address: str) -> StorageError:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"{self._endpoint} answers {status} {code}"
        if code in BUSY_CODES or status == 429 or status >= 500:
            return StorageUnavailable(address, said)
        if code in DENIED_CODES or status in (301, 401, 403):
            return StorageDenied(address, f"{said}: {_advice(code, self._bucket)}")
        if status == 404:
            return ObjectMissing(address)
        return StorageError(address, f"{said}: {error.response.get('Error', {}).get('Message')}")

    def _from_silence(self, error: "BotoCoreError", address: str) -> StorageError:
        from botocore import exceptions

        if isinstance(
            error,
            exceptions.HTTPClientError
            | exceptions.ConnectionError
            | exceptions.IncompleteReadError
            | exceptions.CredentialRetrievalError,
        ):
            return StorageUnavailable(address, f"{self._endpoint} does not answer: {error}")
        if (
            isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError)
            or "Token" in type(error).__name__
        ):
            return StorageDenied(address, f"{error}: {_advice('', self._bucket)}")
        return StorageError(address, str(error))


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """How to reach a store. Without keys, boto3 looks in its own places."""

    endpoint_url: str | None = None
    public_endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None


def _options(values: settings.Settings) -> S3Options:
    secret = values.aws_secret_access_key
    token = values.aws_session_token
    options = S3Options(
        endpoint_url=_endpoint("AWS_ENDPOINT_URL_S3", values.s3_endpoint_url),
        public_endpoint_url=_endpoint("S3_PUBLIC_ENDPOINT_URL", values.s3_public_endpoint_url),
        region=values.aws_region or None,
        access_key_id=values.aws_access_key_id or None,
        secret_access_key=(secret.get_secret_value() or None) if secret else None,
        session_token=(token.get_secret_value() or None) if token else None,
    )
    if bool(options.access_key_id) != bool(options.secret_access_key):
        raise errors.InvalidInput(
            "settings",
            [
                errors.Problem(
                    line=None,
                    message="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together, "
                    "one of them is empty",
                )
            ],
        )
    return options


def _endpoint(name: str, url: str | None) -> str | None:
    if not url:
        return None
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        message = f"{name}: must be http://host:port or https://host, got {_shown(parts)}"
        raise errors.InvalidInput("settings", [errors.Problem(line=None, message=message)])
    return url


def _clients(options: S3Options) -> tuple["S3Client", "S3Client"]:
    """For our own calls, and for links that others follow. InvalidInput: what boto3 refuses."""
    from botocore.exceptions import BotoCoreError  # not at the top: it takes its time to import

    try:
        return _made_clients(options)
    except (BotoCoreError, ValueError) as error:  # such as an AWS_PROFILE that is not there
        problem = errors.Problem(line=None, message=f"object store: {error}")
        raise errors.InvalidInput("settings", [problem]) from error


def _made_clients(options: S3Options) -> tuple["S3Client", "S3Client"]:
    import boto3  # not at the top: the command line starts without it

    # Without a token of its own, keys in the settings must not meet a token from elsewhere.
    session = boto3.Session(
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        aws_session_token=options.session_token if options.access_key_id else None,
        region_name=options.region,
    )

    def client(endpoint_url: str | None) -> "S3Client":
        region = session.region_name or ("us-east-1" if endpoint_url else None)
        return session.client(
            "s3", endpoint_url=endpoint_url, region_name=region, config=_config(endpoint_url)
        )

    own = client(options.endpoint_url)
    public = options.public_endpoint_url
    return own, client(public) if public and public != options.endpoint_url else own


def _config(endpoint_url: str | None) -> "Config":
    from botocore.config import Config

    common: dict[str, Any] = {
        "signature_version": "s3v4",
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": MAX_TRIES},
        "tcp_keepalive": True,
    }
    if endpoint_url is None:
        return Config(**common)
    if urllib.parse.urlsplit(endpoint_url).hostname in ("127.0.0.1", "localhost", "::1"):
        common["proxies"] = {}  # HTTP_PROXY is for other machines
    # Many compatible stores refuse boto3's newer checksum headers.
    return Config(
        **common,
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _code(error: "ClientError") -> str:
    return error.response.get("Error", {}).get("Code", "")


def _advice(code: str, bucket: str) -> str:
    if code == "NoSuchBucket":
        return f"create the bucket {bucket!r}, or name another in RUSHES_RESULTS_URL"
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine is wrong"
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return "set AWS_REGION to the region of the bucket"
    return "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights on the bucket"


def _from_os_error(error: OSError, address: str) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
        return ObjectMissing(address)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageDenied(address, reason)
    return StorageUnavailable(address, reason)


def _mismatch(
    address: str, key: str, sent: "_Digest", stored_bytes: int | None, stored_sha256: str | None
) -> UploadMismatch:
    return UploadMismatch(
        address,
        key=key,
        sent_bytes=sent.size_bytes,
        stored_bytes=stored_bytes,
        sent_sha256=sent.sha256,
        stored_sha256=stored_sha256,
    )


@dataclass(frozen=True, kw_only=True)
class _Digest:
    size_bytes: int
    sha256: str
    md5: str


def _digest(source: IO[bytes]) -> _Digest:
    size_bytes, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    while chunk := source.read(CHUNK_BYTES):
        size_bytes += len(chunk)
        sha256.update(chunk)
        md5.update(chunk)
    return _Digest(size_bytes=size_bytes, sha256=sha256.hexdigest(), md5=md5.hexdigest())


def _digest_bytes(data: bytes) -> _Digest:
    return _digest(io.BytesIO(data))


def _base64_of(hex_digest: str) -> str:
    return base64.b64encode(binascii.unhexlify(hex_digest)).decode()


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Closable(_Readable, Protocol):
    def close(self) -> None: ...


def _chunks(source: _Closable, count: int) -> Iterator[bytes]:
    with contextlib.closing(source):
        while count > 0 and (chunk := source.read(min(CHUNK_BYTES, count))):
            count -= len(chunk)
            yield chunk


def _write_whole(source: _Readable, target: Path) -> None:
    """Write beside the target, flush to disk, rename; a crash leaves the old file or the new."""
    part = target.with_name(f"{PART_PREFIX}{secrets.token_hex(8)}")
    try:
        with part.open("xb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _write_below(source: _Readable, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(source, target)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checked_key(key: str) -> str:
    """The key, if every store can hold it and no folder can be left with it."""
    parts = key.split("/")
    problem = None
    if any(part in ("", ".", "..") for part in parts):
        problem = "parts between slashes must not be empty, `.` or `..`"
    elif "\\" in key or not key.isprintable():
        problem = "no backslash, no control character"
    elif any(part.startswith(RESERVED_PREFIXES) for part in parts):
        problem = f"no part may start with {' or '.join(RESERVED_PREFIXES)}"
    elif len(key.encode()) > 900 or any(len(part.encode()) > 255 for part in parts):
        problem = "at most 900 bytes, 255 between slashes"
    if problem:
        raise errors.InvalidInput(
            "object key", [errors.Problem(line=None, message=f"{problem}; got {key[:100]!r}")]
        )
    return key


def _check_prefix(prefix: str) -> None:
    if prefix:
        _checked_key(prefix.removesuffix("/"))


def _check_link_seconds(seconds: int) -> None:
    if not 1 <= seconds <= MAX_LINK_SECONDS:
        message = f"a link can live for 1 second to 7 days ({MAX_LINK_SECONDS} s), got {seconds}"
        raise errors.InvalidInput("link", [errors.Problem(line=None, message=message)])


def _attachment(file_name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", file_name)
    quoted = urllib.parse.quote(file_name, safe="")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quoted}"


def _folder_of(parts: urllib.parse.SplitResult) -> Path:
    folder = Path(urllib.parse.unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not folder.is_absolute():
        raise _bad_url(f"got {_shown(parts)}; a folder takes three slashes")
    if folder == Path("/"):
        raise _bad_url("got file:///, the root of the machine")
    return folder


def _bucket_of(parts: urllib.parse.SplitResult) -> tuple[str, str]:
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", bucket):
        raise _bad_url(f"no bucket name in {_shown(parts)}")
    if parts.query or parts.fragment:
        raise _bad_url(f"no `?` or `#`; got {_shown(parts)}")
    _check_prefix(prefix)
    return bucket, prefix


def _shown(parts: urllib.parse.SplitResult) -> str:
    """Without what may be a password."""
    host = parts.netloc.rpartition("@")[2]
    return repr(urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", "")))


def _bad_url(problem: str) -> errors.InvalidInput:
    message = f"must be s3://bucket/prefix or file:///absolute/folder: {problem}"
    return errors.InvalidInput("RUSHES_RESULTS_URL", [errors.Problem(line=None, message=message)])
