"""Opens the store at a URL, with the keys and at the endpoint of the settings."""

import dataclasses
import functools
import re
import ssl
import urllib.parse
from pathlib import Path

from jobs import errors, folder_store, s3_clients, s3_store, settings, storage


def open_store(
    values: settings.Settings, *, answer_seconds: float | None = None
) -> storage.ObjectStore:
    """The store at `results_url`. Connects on first use, so it opens while the store is down.

    Patient, unless `answer_seconds` says how long a silence may last, of each address and try.
    """
    url = values.results_url
    parts = _split("RUSHES_RESULTS_URL", url)
    if parts.scheme == "file":
        folder = _folder_of(parts)
        return folder_store.FolderStore(folder, may_make=values.home in folder.parents)
    if parts.scheme == "s3":
        bucket, prefix = _bucket_of(parts)
        options = dataclasses.replace(_options(values), answer_seconds=answer_seconds)
        return s3_store.S3Store(bucket, prefix, options=options)
    raise _bad_url(f"got {_shown(parts)}")


@functools.lru_cache(maxsize=8)  # a client takes a tenth of a second to make
def open_bucket(values: settings.Settings, bucket: str) -> storage.ObjectStore:
    """Any bucket, with the keys and at the endpoint of the results."""
    return open_store(values.model_copy(update={"results_url": f"s3://{bucket}"}))


def _options(values: settings.Settings) -> s3_clients.Options:
    secret = values.aws_secret_access_key
    token = values.aws_session_token
    options = s3_clients.Options(
        endpoint_url=_endpoint("AWS_ENDPOINT_URL_S3", values.s3_endpoint_url),
        public_endpoint_url=_endpoint("S3_PUBLIC_ENDPOINT_URL", values.s3_public_endpoint_url),
        region=values.aws_region or None,
        access_key_id=values.aws_access_key_id or None,
        secret_access_key=(secret.get_secret_value() or None) if secret else None,
        session_token=(token.get_secret_value() or None) if token else None,
        addressing_style=values.s3_addressing_style or "path",
        ca_bundle=values.aws_ca_bundle,
    )
    _check_bundle(options)
    if bool(options.access_key_id) != bool(options.secret_access_key):
        raise errors.invalid(
            "settings",
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together, one of them is empty",
        )
    return options


def _check_bundle(options: s3_clients.Options) -> None:
    """Later, the same fault would look like a store that does not answer."""
    urls = (options.endpoint_url or "https:", options.public_endpoint_url or "")
    if options.ca_bundle is None or not any(url.lower().startswith("https:") for url in urls):
        return
    try:
        ssl.create_default_context(cafile=options.ca_bundle)
    except OSError as error:
        message = f"AWS_CA_BUNDLE={options.ca_bundle}: no file of certificates (PEM): {error}"
        raise errors.invalid("settings", message) from error


def _endpoint(name: str, url: str | None) -> str | None:
    if not url:
        return None
    parts = _split(name, url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        message = f"{name}: must be http://host:port or https://host, got {_shown(parts)}"
        raise errors.invalid("settings", message)
    return url


def _split(name: str, url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:  # its words may show a part of the password
        message = f"{name} is no address: an IPv6 address is written [::1]"
        raise errors.invalid("settings", message) from None


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
    storage.check_prefix(prefix)
    return bucket, prefix


def _shown(parts: urllib.parse.SplitResult) -> str:
    """Without what may be a password."""
    host = parts.netloc.rpartition("@")[2]
    return repr(urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", "")))


def _bad_url(problem: str) -> errors.InvalidInput:
    message = f"must be s3://bucket/prefix or file:///absolute/folder: {problem}"
    return errors.invalid("RUSHES_RESULTS_URL", message)
