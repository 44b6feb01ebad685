"""Where things are: database, broker, results, folders. How a video looks is a preset's business.

Source order, first one wins: arguments, environment, `NAME_FILE` (the name of a file that holds the
value), `.env` in the current folder, what a running `rushes up` wrote to `RUSHES_HOME/up.json`,
the default.
"""

import getpass
import ipaddress
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, urlencode

import psutil
from dotenv.parser import parse_stream
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy.engine import URL

from jobs import errors

LOCAL_RESULTS = Path("s3", "buckets", "rushes")  # the bucket of `rushes up`, seen as a folder
UP_FILE = "up.json"  # in RUSHES_HOME, while `rushes up` runs
LONGEST_HOST = 180  # `gpu0@` and it: the database takes 200
LONGEST_SECONDS = 7 * 24 * 3600
Days = Annotated[float, Field(ge=0, le=36_500)]  # that something is kept for
HOST_NAME = r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?"
ORIGIN = rf"[A-Za-z][A-Za-z0-9+.-]*://({HOST_NAME}|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?"
RESULTS_NAMES = (
    "RUSHES_RESULTS_URL",
    "AWS_ENDPOINT_URL_S3",
    "S3_PUBLIC_ENDPOINT_URL",
    "S3_ADDRESSING_STYLE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
)


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user often has no name
        return ""


def _host_name() -> str:
    """The machine's, which may hold anything, as one that is always taken."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:LONGEST_HOST]


class Settings(BaseSettings):
    """One value per fact; the environment names are the ones people know from other tools."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_file=".env", env_ignore_empty=True
    )

    home: Path = Field(
        Path(".rushes"),
        validation_alias=AliasChoices("RUSHES_HOME"),
        description="Folder for everything that rushes keeps on this machine.",
    )
    database_url: SecretStr = Field(
        SecretStr(""),
        validation_alias=AliasChoices("DATABASE_URL"),
        description="SQLAlchemy URL; `postgres://` works too. Default: SQLite in RUSHES_HOME.",
    )
    broker_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        validation_alias=AliasChoices("CELERY_BROKER_URL", "REDIS_URL"),
        description="Redis or Valkey, `redis://` or `rediss://`.",
    )
    results_url: str = Field(
        "",
        validation_alias=AliasChoices("RUSHES_RESULTS_URL"),
        description="`s3://bucket/prefix` or `file:///folder`. Default: `s3/buckets/rushes` in "
        "RUSHES_HOME, the folder that the S3 server of `rushes up` serves.",
    )
    s3_endpoint_url: str | None = Field(
        None,
        validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        description="Address of an S3-compatible store; unset for AWS itself.",
    )
    s3_public_endpoint_url: str | None = Field(
        None,
        validation_alias=AliasChoices("S3_PUBLIC_ENDPOINT_URL"),
        description="Address of the same store as readers reach it; presigned links point there.",
    )
    s3_addressing_style: Literal["path", "virtual"] | None = Field(
        None,
        validation_alias=AliasChoices("S3_ADDRESSING_STYLE"),
        description="`virtual` for a store, not AWS, that wants the bucket in the host's name; "
        "else it is in the `path`.",
    )
    aws_access_key_id: str | None = Field(
        None,
        validation_alias=AliasChoices("AWS_ACCESS_KEY_ID"),
        description="Unset: boto3 looks in its own places (profile, instance role).",
    )
    aws_secret_access_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("AWS_SECRET_ACCESS_KEY"),
        description="Belongs to AWS_ACCESS_KEY_ID.",
    )
    aws_session_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("AWS_SESSION_TOKEN"),
        description="For temporary credentials.",
    )
    aws_region: str | None = Field(
        None,
        validation_alias=AliasChoices("AWS_REGION", "AWS_DEFAULT_REGION"),
        description="Region of the bucket.",
    )
    aws_ca_bundle: Path | None = Field(
        None,
        validation_alias=AliasChoices("AWS_CA_BUNDLE"),
        description="File (PEM) with the certificates that the store is to be trusted by.",
    )
    presets_dir: Path | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_PRESETS_DIR"),
        description="A folder of your own preset files, searched before the shipped ones.",
    )
    models_dir: Path = Field(  # type: ignore[assignment]  # filled in by model_post_init
        None,  # not Path(): that is `.`
        validate_default=False,
        validation_alias=AliasChoices("RUSHES_MODELS_DIR"),
        description="One folder of weights per model. Default: `models` in RUSHES_HOME.",
    )
    scratch_dir: Path = Field(  # type: ignore[assignment]  # filled in by model_post_init
        None,
        validate_default=False,
        validation_alias=AliasChoices("RUSHES_SCRATCH_DIR"),
        description="Unfinished and not yet uploaded videos. Default: `scratch` in RUSHES_HOME.",
    )
    owner: str = Field(
        default_factory=_os_user,
        max_length=200,
        validation_alias=AliasChoices("RUSHES_OWNER"),
        description="Whose the submitted batches are: owners share the farm equally. Default: the "
        "user of the operating system.",
    )
    max_running_per_owner: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("RUSHES_MAX_RUNNING_PER_OWNER"),
        description="Jobs of one owner that may run at once.",
    )
    max_queued_per_owner: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("RUSHES_MAX_QUEUED_PER_OWNER"),
        description="Jobs of one owner that may be queued; a submit beyond that is refused.",
    )
    host_name: str = Field(
        default_factory=_host_name,
        validation_alias=AliasChoices("RUSHES_HOST"),
        description="Name of this machine in worker names; must differ between machines.",
    )
    lease_seconds: float = Field(
        50.0,  # and a tick: a hung host is noticed within a minute
        gt=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_LEASE_SECONDS"),
        description="A worker silent for this long has lost its job to the queue.",
    )
    publish_lease_seconds: float = Field(
        600.0,
        gt=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_PUBLISH_LEASE_SECONDS"),
        description="The same for a finished video that waits on its host for upload.",
    )
    max_errors: int = Field(
        3,
        ge=1,
        le=100,
        validation_alias=AliasChoices("RUSHES_MAX_ERRORS"),
        description="A job fails for good after this many attempts that raised.",
    )
    max_crashes: int = Field(
        2,
        ge=1,
        le=100,
        validation_alias=AliasChoices("RUSHES_MAX_CRASHES"),
        description="A job is quarantined after this many attempts whose worker died.",
    )
    retry_seconds: float = Field(
        10.0,
        ge=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_RETRY_SECONDS"),
        description="Longest wait before the first retry, at most ten minutes; doubles with each.",
    )
    window: int = Field(
        2,
        ge=1,
        le=1_000,
        validation_alias=AliasChoices("RUSHES_WINDOW"),
        description="Messages kept in Redis per live worker.",
    )
    tick_seconds: float = Field(
        2.0,
        gt=0,
        le=3_600,
        validation_alias=AliasChoices("RUSHES_TICK_SECONDS"),
        description="The dispatcher looks at least this often.",
    )
    grace_seconds: float = Field(
        300.0,
        ge=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_GRACE_SECONDS"),
        description="A stopping worker may finish its job for this long, then gives it back.",
    )
    prompt_check: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_PROMPT_CHECK"),
        description="`module:function` that may refuse a prompt: where prompts are submitted, or "
        "before they are rendered, or both, by where it is set.",
    )
    default_preset: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_DEFAULT_PRESET"),
        description="For requests to the compatible APIs that name no preset of ours.",
    )
    default_image_preset: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_DEFAULT_IMAGE_PRESET"),
        description="The same for requests with an image.",
    )
    web_host: str = Field(
        "127.0.0.1",
        validation_alias=AliasChoices("RUSHES_WEB_HOST"),
        description="Address that the web service listens on; others than loopback need tokens.",
    )
    web_port: int = Field(
        8000,
        ge=1,
        le=65_535,
        validation_alias=AliasChoices("RUSHES_WEB_PORT"),
        description="Port of the web service.",
    )
    web_require_token: bool = Field(
        False,
        validation_alias=AliasChoices("RUSHES_WEB_REQUIRE_TOKEN"),
        description="Ask for a token on loopback too, as behind a proxy.",
    )
    web_names: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_WEB_NAMES"),
        description="Host names under which the service on loopback is reached, with commas.",
    )
    web_cors_origins: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_WEB_CORS_ORIGINS"),
        description="Origins of web pages that may call the service, with commas.",
    )
    forwarded_allow_ips: str = Field(
        "127.0.0.1,::1",
        validation_alias=AliasChoices("FORWARDED_ALLOW_IPS"),
        description="Addresses and networks of proxies whose `X-Forwarded-For` and "
        "`X-Forwarded-Proto` are believed, with commas; `*` for any.",
    )
    web_rate: str = Field(
        "600/minute",
        validation_alias=AliasChoices("RUSHES_WEB_RATE"),
        description="Requests per token, or per address without one; `off` for no limit.",
    )
    web_max_bytes: int = Field(
        256 << 20,
        ge=1 << 20,
        validation_alias=AliasChoices("RUSHES_WEB_MAX_BYTES"),
        description="Largest request, in bytes.",
    )
    keep_results_days: Days | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_KEEP_RESULTS_DAYS"),
        description="Videos and result files of a batch, after its end. Unset: for ever.",
    )
    keep_batches_days: Days | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_KEEP_BATCHES_DAYS"),
        description="Rows of a batch, its jobs and attempts, after its end. Unset: for ever.",
    )
    keep_uploads_days: Days | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_KEEP_UPLOADS_DAYS"),
        description="Files that programs uploaded. Unset: for ever.",
    )
    keep_inputs_days: Days = Field(
        30.0,
        validation_alias=AliasChoices("RUSHES_KEEP_INPUTS_DAYS"),
        description="Input images, after the end of the last batch that starts from them.",
    )
    keep_keys_days: Days = Field(
        90.0,
        validation_alias=AliasChoices("RUSHES_KEEP_KEYS_DAYS"),
        description="Idempotency keys, after the end of their batch.",
    )
    keep_requests_days: Days = Field(
        90.0,
        validation_alias=AliasChoices("RUSHES_KEEP_REQUESTS_DAYS"),
        description="Refused requests to the compatible APIs.",
    )
    keep_tokens_days: Days = Field(
        90.0,
        validation_alias=AliasChoices("RUSHES_KEEP_TOKENS_DAYS"),
        description="Tokens, after they were revoked or ran out.",
    )
    keep_workers_days: Days = Field(
        30.0,
        validation_alias=AliasChoices("RUSHES_KEEP_WORKERS_DAYS"),
        description="Workers that have stopped or fallen silent.",
    )
    keep_history_days: Days = Field(
        365.0,
        validation_alias=AliasChoices("RUSHES_KEEP_HISTORY_DAYS"),
        description="What became of the fire times of schedules.",
    )
    keep_notices_days: Days = Field(
        30.0,
        validation_alias=AliasChoices("RUSHES_KEEP_NOTICES_DAYS"),
        description="Notices that were delivered or given up.",
    )
    keep_scratch_days: Days = Field(
        30.0,
        validation_alias=AliasChoices("RUSHES_KEEP_SCRATCH_DAYS"),
        description="Files in the scratch folder that no attempt needs.",
    )
    notify_internal_hosts: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_NOTIFY_INTERNAL_HOSTS"),
        description="Hosts of your own network that notices may be sent to, with commas.",
    )
    log_level: str = Field(
        "INFO",
        validation_alias=AliasChoices("LOG_LEVEL"),
        description="DEBUG, INFO, WARNING or ERROR.",
    )
    log_format: str = Field(
        "auto",
        pattern="^(auto|json|text)$",
        validation_alias=AliasChoices("RUSHES_LOG_FORMAT"),
        description="`json`, `text`, or `auto`: text on a terminal.",
    )

    @property
    def default_presets(self) -> dict[str, str | None]:
        """By the name of their setting."""
        return {
            "RUSHES_DEFAULT_PRESET": self.default_preset,
            "RUSHES_DEFAULT_IMAGE_PRESET": self.default_image_preset,
        }

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError(f"must be DEBUG, INFO, WARNING or ERROR, got {value!r}")
        return value.upper()

    @field_validator("owner")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable() or value.isspace():
            raise ValueError("must be printable, and not blank")
        return value.strip()

    @field_validator("host_name")
    @classmethod
    def _part_of_a_queue(cls, value: str) -> str:
        # Celery takes a comma for the end of a queue's name, and % for a place in a template. The
        # lock of a worker is a file with its name, quoted.
        if not value.isprintable() or value != value.strip() or {",", "%"} & set(value):
            raise ValueError("must be printable, without comma, % and blanks at its ends")
        if len(quote(value, safe="@")) > LONGEST_HOST:
            raise ValueError(
                f"must have at most {LONGEST_HOST} characters; "
                "all but letters, digits and .-_~@ count several times"
            )
        return value

    @field_validator("web_names")
    @classmethod
    def _host_names(cls, value: str | None) -> str | None:
        for part in listed(value):
            if not re.fullmatch(HOST_NAME, part) and not _is_address(part):
                raise ValueError(f"must be names such as gpu.example, without port, got {part!r}")
        return value

    @field_validator("web_cors_origins")
    @classmethod
    def _origins(cls, value: str | None) -> str | None:
        for part in listed(value):
            if part == "*":
                raise ValueError("must name each origin: with * any page could read all of ours")
            if not re.fullmatch(ORIGIN, part):
                raise ValueError(
                    f"must be such as https://app.example:8443, without a path, got {part!r}"
                )
        return value

    @field_validator("web_rate")
    @classmethod
    def _known_rate(cls, value: str) -> str:
        if not re.fullmatch(r"off|[1-9][0-9]{0,8}/(second|minute|hour|day)", value):
            raise ValueError(f"must be such as 600/minute, or off, got {value!r}")
        return value

    def model_post_init(self, _context: object) -> None:
        """Fill in what depends on `home`; make paths absolute, for children in other folders."""
        home = _expanded("RUSHES_HOME", self.home).absolute()
        own_presets, ca_bundle = self.presets_dir, self.aws_ca_bundle
        defaults: dict[str, Any] = {
            "home": home,
            "presets_dir": own_presets and _expanded("RUSHES_PRESETS_DIR", own_presets).absolute(),
            "aws_ca_bundle": ca_bundle and _expanded("AWS_CA_BUNDLE", ca_bundle).absolute(),
            "models_dir": _folder("RUSHES_MODELS_DIR", self.models_dir, home / "models"),
            "scratch_dir": _folder("RUSHES_SCRATCH_DIR", self.scratch_dir, home / "scratch"),
            "database_url": SecretStr(
                sqlalchemy_url(self.database_url.get_secret_value())
                or _sqlite_url(home / "rushes.db")
            ),
            "broker_url": SecretStr(redis_url(self.broker_url.get_secret_value())),
            "results_url": self.results_url or (home / LOCAL_RESULTS).as_uri(),
        }
        self.__dict__.update(defaults)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # pydantic's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        files = _FileVariants(settings_cls)
        written = (init_settings, env_settings, files, dotenv_settings)
        up = _by_first_name(read_up_file(_home(written)))
        given_url = _given(written, "RUSHES_RESULTS_URL")
        rest = {name: value for name, value in up.items() if name not in RESULTS_NAMES}
        if not is_store_of_up(up, given_url or up.get("RUSHES_RESULTS_URL")):
            return (*written, _Values(settings_cls, up if given_url is None else rest))
        # The store of `rushes up` comes with its keys: credentials exported for another
        # store must not be mixed with its address.
        store = {name: up.get(name) for name in RESULTS_NAMES}
        return (
            init_settings,
            _Values(settings_cls, store),
            *written[1:],
            _Values(settings_cls, rest),
        )


def load(**overrides: object) -> Settings:
    """The settings of this process; a bad value is reported by its environment name."""
    names = environment_names()
    given = {names[field][0]: value for field, value in overrides.items() if value is not None}
    try:
        _check_lines(Path(".env"))
        return Settings(**given)  # type: ignore[arg-type]  # checked by pydantic
    except UnicodeDecodeError as error:
        raise errors.invalid("settings", f".env: not UTF-8 text ({error.reason})") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            + (
                f" (given: {str(detail['input'])[:80]!r})"
                if isinstance(detail["input"], str | int | float)
                and "url" not in str(detail["loc"]).lower()
                else ""
            )
            for detail in error.errors()
        ]
        raise errors.invalid("settings", *problems) from None


def _check_lines(dotenv: Path) -> None:
    """InvalidInput where one is no `NAME=value`: python-dotenv goes on without it."""
    if not dotenv.is_file():  # a pipe is read once
        return
    with dotenv.open(encoding="utf-8") as stream:
        for binding in parse_stream(stream):
            is_name = binding.value is not None or (binding.key or "_").isidentifier()
            if is_name and not binding.error:
                continue
            text = binding.original.string  # not shown: it may hold a password
            line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
            message = "must be NAME=value, with a quote at both ends of the value or none"
            raise errors.InvalidInput(".env", [errors.Problem(line=line, message=message)])


def problems_of_proxies(given: str) -> list[errors.Problem]:
    """Of `FORWARDED_ALLOW_IPS`, which may be meant for other programs: for who believes them."""
    for part in listed(given) if given != "*" else ():
        try:
            ipaddress.ip_network(part)
        except ValueError as error:
            told = f"FORWARDED_ALLOW_IPS: must be such as 10.1.2.3,10.2.0.0/16, or *: {error}"
            return [errors.Problem(line=None, message=told)]
    return []


def environment_names() -> dict[str, tuple[str, ...]]:
    """Field name -> its names in the environment, in the order they are looked up."""
    names: dict[str, tuple[str, ...]] = {}
    for field, info in Settings.model_fields.items():
        assert isinstance(info.validation_alias, AliasChoices)
        names[field] = tuple(str(choice) for choice in info.validation_alias.choices)
    return names


def given_names() -> set[str]:
    """Names that the environment, a `NAME_FILE` or `.env` gives a value for."""
    names = {name for choices in environment_names().values() for name in choices}
    exported = exported_names()
    from_file = {
        name.upper() for name, value in DotEnvSettingsSource(Settings).env_vars.items() if value
    }
    return {
        name
        for name in names
        if name in exported or os.environ.get(f"{name}_FILE") or name in from_file
    }


def exported_names() -> set[str]:
    """All that the environment gives a value for, as we write it: either case is read."""
    return {name.upper() for name, value in os.environ.items() if value}


def sqlalchemy_url(url: str) -> str:
    """`postgres://` and `postgresql://` name the driver we ship; other URLs are left alone."""
    for scheme in ("postgres://", "postgresql://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    return url


def redis_url(url: str) -> str:
    """`rediss://` asks for a certificate that is trusted, in words that every client reads.

    Unless it says otherwise: left alone, Celery's client would give the password to anybody.
    """
    if not url.startswith("rediss://"):
        return url
    address, hash_sign, rest = url.partition("#")
    address, _, query = address.partition("?")
    options = {"ssl_cert_reqs": ""} | dict(parse_qsl(query, keep_blank_values=True))
    # Celery's documents spell it CERT_REQUIRED, redis-py's required.
    asked = options["ssl_cert_reqs"].removeprefix("CERT_").lower()
    options["ssl_cert_reqs"] = asked or "required"
    # What is a mistake, `broker` refuses: half of a password may stand behind it.
    return f"{address}?{urlencode(options)}{hash_sign}{rest}"


def read_up_file(home: Path) -> dict[str, str]:
    """Environment of a running `rushes up`; empty when it is not running."""
    try:
        state = json.loads((home / UP_FILE).read_text("utf-8"))
        process = psutil.Process(state["pid"])
        is_alive = abs(process.create_time() - state["process_started"]) < 1.0
        return dict(state["environment"]) if is_alive else {}
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return {}


def listed(text: str | None) -> list[str]:
    """What stands between the commas of a setting."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_store_of_up(up: Mapping[str, str], results_url: str | None) -> bool:
    """Whether the `rushes up` of this file runs it: only then are its keys there."""
    return "AWS_ACCESS_KEY_ID" in up and up.get("RUSHES_RESULTS_URL") == results_url


def _sqlite_url(path: Path) -> str:
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def _folder(name: str, given: Path | None, default: Path) -> Path:
    return default if given is None else _expanded(name, given).absolute()


def _expanded(name: str, path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        message = f"{name}={path}: this machine has no user of this name with a home"
        raise errors.invalid("settings", message) from None


def _home(sources: Iterable[PydanticBaseSettingsSource]) -> Path:
    return _expanded("RUSHES_HOME", Path(_given(sources, "RUSHES_HOME") or ".rushes"))


def _given(sources: Iterable[PydanticBaseSettingsSource], name: str) -> str | None:
    """The first value in source order, before any default."""
    values = (source().get(name) for source in sources)
    return next((str(value) for value in values if value), None)


def _by_first_name(values: Mapping[str, str]) -> dict[str, str]:
    """Where a setting has several names: under the one that the other sources use too."""
    return {
        names[0]: values[name]
        for names in environment_names().values()
        for name in reversed(names)
        if name in values
    }


class _Values(PydanticBaseSettingsSource):
    """Values by environment name."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, str | None]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        return dict(self._values)


class _FileVariants(_Values):
    """`DATABASE_URL_FILE=/run/secrets/db` and the like, for every setting."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        values = {}
        for names in environment_names().values():
            for name in names:
                if path := os.environ.get(f"{name}_FILE"):
                    values[name] = _read_secret(f"{name}_FILE", Path(path))
                    break
        super().__init__(settings_cls, _by_first_name(values))


def _read_secret(name: str, path: Path) -> str:
    try:
        value = path.read_text("utf-8").strip()
        problem = None if value else "is empty, a secret that was not filled in"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({error})"
    if problem is not None:
        message = f"{name}={path}: {problem}"
        raise errors.invalid("settings", message)
    return value
