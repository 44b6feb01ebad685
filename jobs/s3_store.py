"""Objects in a bucket of AWS or of any S3-compatible store."""

import base64
import binascii
import contextlib
import re
import threading
import time
import urllib.parse
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from jobs import errors, s3_clients, storage

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef, PutObjectRequestTypeDef

RENEW_SECONDS = 5.0  # between two looks for other credentials: each may ask the host's metadata

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
    "TokenRefreshRequired",
}
STALE_CODES = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"}
BUSY_CODES = {
    "RequestTimeout",
    "SlowDown",
    "TemporaryRedirect",  # of AWS, while the name of a new bucket spreads
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
MISSING_CODES = {"NoSuchKey", "NoSuchVersion"}
READ_RIGHT = "s3:GetObject; without s3:ListBucket what is missing looks refused"
RIGHTS = {
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": READ_RIGHT,
    "HeadObject": READ_RIGHT,
    "ListObjectsV2": "s3:ListBucket; without it what is missing looks refused",
    "PutObject": "s3:PutObject",
}
CHECK_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights on the bucket"

PARTIAL_CONTENT = 206
RANGE_NOT_SATISFIABLE = 416
NOT_IMPLEMENTED = 501
DIGEST_CODES = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
KEYS_CODES = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "PermanentRedirect",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
"""Of DENIED_CODES those that speak of our keys, clock or region, and not of what was asked for."""


class S3Store:
    """Objects in a bucket of AWS or of any S3-compatible store.

    Content-MD5 goes with every upload: each store refuses damaged bytes. The sha256 is kept as
    metadata; a store that forgets metadata (rclone, at a restart) has a head without it.
    """

    def __init__(self, bucket: str, prefix: str, *, options: s3_clients.Options) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._is_aws = options.endpoint_url is None
        self._endpoint = options.endpoint_url or "AWS"
        self._options = options
        self._clients = s3_clients.make(options)
        self._renewing = threading.Lock()
        self._are_stale = False
        """Their credentials are none, or were refused as old."""
        self._renew_at = 0.0

    @property
    def url(self) -> str:
        return self._named("").removesuffix("/")

    def put_file(self, path: Path, key: str, *, content_type: str) -> storage.StoredObject:
        with path.open("rb") as source:
            sent = storage.digest(source)
            source.seek(0)
            return self._put(source, key, sent, content_type)

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> storage.StoredObject:
        return self._put(data, key, storage.digest_bytes(data), content_type)

    def read_bytes(self, key: str) -> bytes:
        with self.translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
            return answer["Body"].read()

    def stream(self, key: str, *, first: int, last: int) -> Generator[bytes]:
        with self.translated(key):
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(key), Range=f"bytes={first}-{last}"
            )
        body = _Body(self, key, answer["Body"])
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        # rclone says 200 to a part as well, and of which bytes it is.
        if status != PARTIAL_CONTENT and "ContentRange" not in answer:
            try:
                body.skip(first)  # some stores give the whole object
            except storage.StorageError:
                body.close()
                raise
        return storage.chunks(body, last - first + 1)

    def download(self, key: str, path: Path) -> None:
        with self.translated(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
        with contextlib.closing(_Body(self, key, answer["Body"])) as body:
            storage.write_whole(body, path)

    def head(self, key: str) -> storage.ObjectHead | None:
        try:
            with self.translated(key):
                answer = self._head(key)
                size_bytes = answer.get("ContentLength")
                if size_bytes is None:
                    size_bytes = self._size_bytes(key)
        except storage.ObjectMissing:
            return None
        # Stores differ in the case of metadata names.
        metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
        return storage.ObjectHead(key=key, size_bytes=size_bytes, sha256=metadata.get("sha256"))

    def entries(self, prefix: str = "") -> Iterator[storage.ObjectEntry]:
        storage.check_prefix(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._name(prefix)
        )
        with self.translated(prefix):
            for page in pages:
                if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                    told = f"{self._endpoint} does not know ListObjectsV2: it lists the first page"
                    raise storage.StorageError(self._named(prefix), f"{told} alone")
                for item in page.get("Contents", []):
                    yield storage.ObjectEntry(
                        key=item["Key"].removeprefix(self._prefix),
                        size_bytes=item["Size"],
                        modified_at=item["LastModified"],
                    )

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def delete(self, key: str) -> None:
        self._delete(storage.checked_key(key))

    def delete_many(self, keys: Sequence[str]) -> None:
        assert len(keys) <= storage.MOST_DELETED_AT_ONCE
        if not keys:
            return
        # Unchecked: they were listed, and a console's mark of a folder, `inputs/`, is among them.
        names = [{"Key": self._name(key)} for key in keys]
        try:
            with self.translated(keys[0]):
                answer = self._client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": names, "Quiet": True},  # type: ignore[typeddict-item]
                )
        except (storage.StorageUnavailable, storage.StorageDenied):
            raise
        except storage.StorageError:
            # Not every store knows this call, or takes the checksum that boto3 sends with it.
            self._delete_each(keys)
            return
        problems = answer.get("Errors", [])
        if refused := [each for each in problems if each.get("Code") not in MISSING_CODES]:
            told = f"{refused[0].get('Code')}: {refused[0].get('Message')}"
            address = f"s3://{self._bucket}/{refused[0].get('Key')}"
            if refused[0].get("Code") in DENIED_CODES:
                raise storage.StorageDenied(address, f"{told}; allow s3:DeleteObject")
            told = f"{len(refused)} were not deleted: {told}"
            if refused[0].get("Code") in {*BUSY_CODES, "InternalError"}:
                raise storage.StorageUnavailable(address, told)
            raise storage.StorageError(address, told)

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:
        storage.check_link_seconds(seconds)
        params = {"Bucket": self._bucket, "Key": self._key(key)}
        if file_name is not None:
            params["ResponseContentDisposition"] = _attachment(file_name)
        with self.translated(key):
            _, client = self._fresh_clients()
            return client.generate_presigned_url("get_object", Params=params, ExpiresIn=seconds)

    def address(self, key: str) -> str:
        return self._named(storage.checked_key(key))

    def keeps_versions(self) -> bool:
        with self.translated(""):
            return (
                self._client.get_bucket_versioning(Bucket=self._bucket).get("Status") == "Enabled"
            )

    def check(self) -> None:
        with self.translated(""):
            self._list_one()

    def _list_one(self) -> None:
        """Not HeadBucket: the refusals of a listing say why."""
        self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def _put(
        self, body: bytes | BinaryIO, key: str, sent: "storage.Digest", content_type: str
    ) -> storage.StoredObject:
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
        with self.translated(key, sent):
            self._client.put_object(**request)
        return self._verified(key, sent)

    def _verified(self, key: str, sent: "storage.Digest") -> storage.StoredObject:
        head = self.head(key)
        if head is None:
            raise storage.mismatch(self.address(key), key, sent, 0, None)
        if head.size_bytes != sent.size_bytes or head.sha256 not in (sent.sha256, None):
            raise storage.mismatch(self.address(key), key, sent, head.size_bytes, head.sha256)
        return storage.StoredObject(key=key, size_bytes=sent.size_bytes, sha256=sent.sha256)

    def _head(self, key: str) -> "HeadObjectOutputTypeDef":
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._key(key))
        except ClientError as error:
            if 300 <= _status(error) < 500 and _status(error) not in (404, 429):
                self._list_one()  # HEAD has no body, and the refusal of a listing has words
            raise

    def _size_bytes(self, key: str) -> int:
        """Of an object whose head does not tell it, as behind a proxy that compresses."""
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(key), Range="bytes=0-0"
            )
        except ClientError as error:
            if _status(error) == RANGE_NOT_SATISFIABLE:
                return 0
            raise
        answer["Body"].close()
        if found := re.fullmatch(r"bytes 0-0/([0-9]+)", answer.get("ContentRange", "")):
            return int(found[1])
        told = f"{self._endpoint} tells no size of its objects"
        raise storage.StorageError(self.address(key), told)

    def _delete(self, key: str) -> None:
        # Some stores answer 404 for what is gone already.
        with contextlib.suppress(storage.ObjectMissing), self.translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def _delete_each(self, keys: Sequence[str]) -> None:
        """One that is locked keeps none of the others."""
        first: storage.StorageError | None = None
        for key in keys:
            try:
                self._delete(key)
            except storage.StorageUnavailable:
                raise
            except storage.StorageError as error:
                first = first or error
        if first is not None:
            raise first

    def _key(self, key: str) -> str:
        return self._name(storage.checked_key(key))

    def _name(self, key: str) -> str:
        return self._prefix + key

    def _named(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._name(key)}"

    @property
    def _client(self) -> "S3Client":
        return self._fresh_clients()[0]

    def _fresh_clients(self) -> tuple["S3Client", "S3Client"]:
        """Made anew after `_renew_credentials`: boto3 looks for them once in a session."""
        with self._renewing:
            if self._are_stale and time.monotonic() >= self._renew_at:
                self._are_stale, self._renew_at = False, time.monotonic() + RENEW_SECONDS
                with contextlib.suppress(errors.InvalidInput):  # a file that is half written
                    self._clients = s3_clients.make(self._options)
            return self._clients

    def _renew_credentials(self) -> None:
        """Soon; those that our settings give are not read again."""
        self._are_stale = self._options.access_key_id is None

    @contextlib.contextmanager
    def translated(self, key: str, sent: "storage.Digest | None" = None) -> Iterator[None]:
        """What goes wrong inside, with an object's calls or its body, is a StorageError."""
        from botocore.exceptions import BotoCoreError, ClientError

        address = self._named(key)
        try:
            yield
        except ClientError as error:
            if sent and _code(error) in DIGEST_CODES:
                raise storage.mismatch(address, key, sent, None, None) from error
            raise self._from_answer(error, address) from error
        except BotoCoreError as error:
            raise self._from_silence(error, address) from error
        except OSError as error:  # such as the file of a token that is not there for a moment
            raise storage.StorageUnavailable(address, f"{self._endpoint}: {error}") from error
        except errors.RushesError:
            raise
        except Exception as error:  # boto3 meets answers that it never foresaw
            told = f"{type(error).__name__}: {errors.first_line(error)}"
            raise storage.StorageError(address, f"{self._endpoint}: {told}") from error

    def _from_answer(self, error: "ClientError", address: str) -> storage.StorageError:
        code, status = _code(error), _status(error)
        said = f"{self._endpoint} answers {status} {code}"
        if code in STALE_CODES:
            self._renew_credentials()
        if code in BUSY_CODES or status == 429 or (status >= 500 and status != NOT_IMPLEMENTED):
            return storage.StorageUnavailable(address, said)
        if 300 <= status < 400 and code != "PermanentRedirect":
            told = f"redirects to {_location(error)}: correct AWS_ENDPOINT_URL_S3"
            return storage.StorageDenied(address, f"{self._endpoint} {told}")
        missing = _missing(error)
        if missing == "object":
            return storage.ObjectMissing(address)
        if message := error.response.get("Error", {}).get("Message"):
            said = f"{said}: {message.rstrip('.')}"
        if missing == "S3":
            told = "there is no S3 at this endpoint: correct AWS_ENDPOINT_URL_S3"
            return storage.StorageDenied(address, f"{said}; {told}")
        if code in DENIED_CODES or status in (401, 403):
            kind = storage.KeysRefused if code in KEYS_CODES else storage.StorageDenied
            return kind(address, f"{said}; {self._advice(error)}")
        return storage.StorageError(address, said)

    def _from_silence(self, error: "BotoCoreError", address: str) -> storage.StorageError:
        from botocore import exceptions

        if isinstance(
            error,
            exceptions.HTTPClientError
            | exceptions.ConnectionError
            | exceptions.IncompleteReadError
            | exceptions.CredentialRetrievalError,
        ):
            return storage.StorageUnavailable(address, f"{self._endpoint} does not answer: {error}")
        if (
            isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError)
            or "Token" in type(error).__name__
        ):
            self._renew_credentials()
            return storage.KeysRefused(address, f"{error}: {CHECK_KEYS}")
        return storage.StorageError(address, str(error))

    def _advice(self, error: "ClientError") -> str:
        code = _code(error)
        if code == "NoSuchBucket":
            return f"create the bucket {self._bucket!r}, or name another in RUSHES_RESULTS_URL"
        if code == "RequestTimeTooSkewed":
            return "the clock of this machine is wrong"
        if code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
            return "set AWS_REGION to the region of the bucket"
        if code == "SecondLevelDomainForbidden":
            return "set S3_ADDRESSING_STYLE=virtual: this store wants the bucket in the host's name"
        if code in STALE_CODES and self._options.access_key_id is None:
            return "renew them where boto3 finds them (profile, instance role); no restart needed"
        if code in STALE_CODES:
            return (
                "correct or renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, "
                "and restart what runs: it reads them once"
            )
        right = RIGHTS.get(error.operation_name)
        return f"{CHECK_KEYS} ({right})" if right else CHECK_KEYS


class _Body:
    """What is read of an object. Its faults are the store's; those of who writes it are not."""

    def __init__(self, store: S3Store, key: str, body: "StreamingBody") -> None:
        self._store = store
        self._key = key
        self._body = body

    def read(self, size: int, /) -> bytes:
        try:
            with self._store.translated(self._key):
                return self._body.read(size)
        except storage.StorageUnavailable as error:
            raise storage.BrokenOff(error.address, f"broke off: {error.__cause__}") from error

    def skip(self, count: int) -> None:
        while count > 0 and (chunk := self.read(min(storage.CHUNK_BYTES, count))):
            count -= len(chunk)

    def close(self) -> None:
        self._body.close()


def _code(error: "ClientError") -> str:
    return error.response.get("Error", {}).get("Code", "")


def _status(error: "ClientError") -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _location(error: "ClientError") -> str:
    """Where an answer redirects to, without what may be secret."""
    location = _headers(error).get("location", "another address").partition("?")[0]
    return re.sub(r"//[^/]*@", "//", location)[:200]


def _headers(error: "ClientError") -> dict[str, str]:
    return error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})


def _missing(error: "ClientError") -> Literal["object", "S3"] | None:
    """What a 404 says that there is not. The answer to HEAD has no body that could say so."""
    operation, code = error.operation_name, _code(error)
    if _status(error) != 404 or code == "NoSuchBucket" or operation == "DeleteObjects":
        return None  # not every store knows DeleteObjects
    if operation in ("ListObjectsV2", "PutObject"):
        return "S3"
    # Some stores answer so, without a word, for what is gone already.
    is_bare = operation == "DeleteObject" and code in ("", "404") and not _is_page(error)
    return "object" if operation == "HeadObject" or code in MISSING_CODES or is_bare else "S3"


def _is_page(error: "ClientError") -> bool:
    """Some words of a web server or a proxy."""
    headers = _headers(error)
    is_text = headers.get("content-type", "").startswith(("text/html", "text/plain"))
    return is_text and headers.get("content-length") != "0"


def _attachment(file_name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", file_name)
    quoted = urllib.parse.quote(file_name, safe="")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quoted}"


def _base64_of(hex_digest: str) -> str:
    return base64.b64encode(binascii.unhexlify(hex_digest)).decode()
