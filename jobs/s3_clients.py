"""Clients of boto3 for one store: where it is, with which keys, and how patient they are."""

import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs import direct, errors

if TYPE_CHECKING:
    from botocore.config import Config
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

AddressingStyle = Literal["path", "virtual"]

AWS_HOST = re.compile(r"\.amazonaws\.com(\.cn)?$")
CONNECT_SECONDS = 5
READ_SECONDS = 60
MAX_TRIES = 3  # inside one call; waiting out an outage is the caller's business


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reach a store. Without keys, boto3 looks in its own places."""

    endpoint_url: str | None = None
    public_endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    addressing_style: AddressingStyle = "path"
    """Of other stores than AWS: the bucket in the `path`, or in the host's name (`virtual`)."""
    ca_bundle: Path | None = None
    """In place of the well-known authorities."""
    answer_seconds: float | None = None
    """For callers whom somebody waits for: two tries, no silence longer than this in each."""


def make(options: Options) -> tuple["S3Client", "S3Client"]:
    """For our own calls, and for links that others follow. InvalidInput: what boto3 refuses."""
    from botocore.exceptions import BotoCoreError  # not at the top: it takes its time to import

    try:
        return _made_clients(options)
    except (BotoCoreError, ValueError, OSError) as error:  # such as an AWS_PROFILE not there
        raise errors.invalid("settings", f"object store: {error}") from error


def _made_clients(options: Options) -> tuple["S3Client", "S3Client"]:
    import boto3  # not at the top: the command line starts without it

    # Without a token of its own, keys in the settings must not meet a token from elsewhere.
    session = boto3.Session(
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        aws_session_token=options.session_token if options.access_key_id else None,
        region_name=options.region,
    )

    # An empty AWS_CA_BUNDLE is none to our settings, and an error to boto3.
    is_empty = os.environ.get("AWS_CA_BUNDLE") == ""
    trusted = str(options.ca_bundle) if options.ca_bundle else is_empty or None

    def client(endpoint_url: str | None, style: AddressingStyle | None = None) -> "S3Client":
        region = session.region_name or ("us-east-1" if endpoint_url else None)
        made = session.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region,
            verify=trusted,
            config=_config(endpoint_url, options, style),
        )
        made.meta.events.register_last("before-parameter-build.s3", _redirect_once)
        return made

    own = client(options.endpoint_url)
    public = options.public_endpoint_url
    if public and public != options.endpoint_url:
        return own, client(public)
    if AWS_HOST.search(own.meta.endpoint_url):  # and not one that ~/.aws/config names
        # Left alone, links lead to the host of all regions, which sends on or does not know them.
        return own, client(None, "virtual")
    return own, own


def _redirect_once(model: "OperationModel", context: dict[str, Any], **_: object) -> None:
    """Redirected, boto3 asks HeadBucket for the region; redirected again, without an end."""
    if model.name == "HeadBucket":
        context.setdefault("s3_redirect", {})["redirected"] = True


def _config(
    endpoint_url: str | None, options: Options, style: AddressingStyle | None = None
) -> "Config":
    from botocore.config import Config

    common: dict[str, Any] = {
        "signature_version": "s3v4",
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": MAX_TRIES},
        "tcp_keepalive": True,
    }
    if options.answer_seconds is not None:
        common["connect_timeout"] = common["read_timeout"] = options.answer_seconds
        common["retries"] = {"mode": "standard", "total_max_attempts": 2}
    if endpoint_url is None:
        return Config(**common, s3={"addressing_style": style} if style else None)
    if urllib.parse.urlsplit(endpoint_url).hostname in direct.LOOPBACK:
        common["proxies"] = {}  # HTTP_PROXY is for other machines
    # Many compatible stores refuse boto3's newer checksum headers.
    return Config(
        **common,
        s3={"addressing_style": options.addressing_style},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
