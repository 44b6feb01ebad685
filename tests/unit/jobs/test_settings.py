"""Where each value comes from, and what a person is told about a bad one."""

import getpass
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic_core import PydanticUndefined

from jobs import errors, misspelt, settings

REPOSITORY = Path(__file__).resolve().parents[3]

UP = {
    "CELERY_BROKER_URL": "redis://:up@127.0.0.1:7001/0",
    "RUSHES_RESULTS_URL": "s3://rushes",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:7002",
    "AWS_ACCESS_KEY_ID": "up-key",
    "AWS_SECRET_ACCESS_KEY": "up-secret",
    "AWS_REGION": "us-east-1",
}


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("RUSHES_HOME", str(home))
    return home


def rushes_up(home: Path, environment: Mapping[str, str] = UP, **state: Any) -> None:
    """As `rushes up` leaves it; this process stands for it."""
    process = psutil.Process()
    values = {"pid": process.pid, "process_started": process.create_time(), **state}
    (home / "up.json").write_text(json.dumps({**values, "environment": dict(environment)}))


def secret(value: Any) -> str | None:
    return None if value is None else value.get_secret_value()


def broker() -> str:
    return settings.load().broker_url.get_secret_value()


# Source order.


def test_each_source_goes_before_the_next_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert broker() == "redis://127.0.0.1:6379/0"
    rushes_up(home)
    assert broker() == UP["CELERY_BROKER_URL"]
    Path(".env").write_text("CELERY_BROKER_URL=redis://dotenv/0\n")
    assert broker() == "redis://dotenv/0"
    held = tmp_path / "secret"
    held.write_text("redis://file/0\n")
    monkeypatch.setenv("CELERY_BROKER_URL_FILE", str(held))
    assert broker() == "redis://file/0"
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://environment/0")
    assert broker() == "redis://environment/0"
    given = settings.load(broker_url="redis://argument/0").broker_url
    assert given.get_secret_value() == "redis://argument/0"


def test_a_second_name_counts_in_its_own_place_of_the_order(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """REDIS_URL in the environment beats CELERY_BROKER_URL in `.env`, and so on down."""
    rushes_up(home)
    Path(".env").write_text("REDIS_URL=redis://dotenv/0\n")
    assert broker() == "redis://dotenv/0"
    Path(".env").write_text("CELERY_BROKER_URL=redis://dotenv/0\n")
    held = tmp_path / "secret"
    held.write_text("redis://file/0")
    monkeypatch.setenv("REDIS_URL_FILE", str(held))
    assert broker() == "redis://file/0"
    monkeypatch.setenv("REDIS_URL", "redis://environment/0")
    assert broker() == "redis://environment/0"
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://first/0")
    assert broker() == "redis://first/0"


@pytest.mark.parametrize("field", settings.Settings.model_fields)
def test_every_setting_can_come_from_a_file(
    field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = {
        "log_level": "ERROR",
        "log_format": "json",
        "aws_access_key_id": "id",
        "s3_addressing_style": "virtual",
        "forwarded_allow_ips": "10.0.0.0/8,::1",
        "web_rate": "5/hour",
        "web_names": "gpu.example, 10.1.2.3, ::1",
        "web_cors_origins": "https://app.example, http://[::1]:3000, tauri://localhost",
        "web_max_bytes": "2000000",
        "web_require_token": "True",
    }
    numbers = (float, int, int | None, settings.Days | None)
    kinds: dict[object, str] = {Path: "/some/where"} | dict.fromkeys(numbers, "17")
    info = settings.Settings.model_fields[field]
    value = samples.get(field) or kinds.get(info.annotation, "/other")
    held = tmp_path / "held"
    held.write_text(value + "\n")
    for name in settings.environment_names()[field]:
        with monkeypatch.context() as patch:
            patch.delenv("RUSHES_HOME")
            patch.setenv(f"{name}_FILE", str(held))
            loaded = getattr(settings.load(), field)
        shown = loaded.get_secret_value() if hasattr(loaded, "get_secret_value") else loaded
        assert str(shown) in (value, f"{value}.0")


def test_an_empty_value_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "")
    monkeypatch.setenv("RUSHES_WINDOW", "")
    Path(".env").write_text("REDIS_URL=\nCELERY_BROKER_URL=redis://dotenv/0\n")
    assert broker() == "redis://dotenv/0"
    assert settings.load().window == 2


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", "/nowhere/at/all")
    with pytest.raises(errors.InvalidInput, match="DATABASE_URL_FILE=/nowhere/at/all"):
        settings.load()


def test_an_empty_file_is_told_and_is_not_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a secret that was not filled in would mean SQLite."""
    held = tmp_path / "secret"
    held.write_text(" \n")
    Path(".env").write_text("DATABASE_URL=postgresql://h/d\n")
    monkeypatch.setenv("DATABASE_URL_FILE", str(held))
    with pytest.raises(errors.InvalidInput, match=f"DATABASE_URL_FILE={held}: is empty"):
        settings.load()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("DATABASE_URL: postgresql://u:hunter2@h/d\n", 1),
        ("X=1\n\n\nDATABASE_URL:postgresql://u:hunter2@h/d\n", 4),
        ("# secrets\nDATABASE_URL='postgresql://u:hunter2@h/d\nRUSHES_WINDOW=3\n", 2),
        ('X=1\r\n\r\nREDIS_URL="redis://:hunter2@h" 0\r\n', 3),
    ],
)
def test_a_line_of_dotenv_that_cannot_be_read_is_told(text: str, line: int) -> None:
    Path(".env").write_bytes(text.encode())
    with pytest.raises(errors.InvalidInput, match=r"\.env: line \d+: must be NAME=value") as caught:
        settings.load()
    (problem,) = caught.value.problems
    assert problem.line == line
    assert "hunter2" not in str(caught.value)


def test_all_that_a_dotenv_may_hold_is_read() -> None:
    text = "\ufeff# one\n\nexport RUSHES_WINDOW=3 # three\nLONE\nX='a\nb'\nY=\n"
    Path(".env").write_text(text)
    assert settings.load().window == 3


def test_a_dotenv_that_is_no_text_is_told() -> None:
    Path(".env").write_bytes(b"RUSHES_WINDOW=\xff\xfe\n")
    with pytest.raises(errors.InvalidInput, match=r"\.env: not UTF-8"):
        settings.load()


def test_other_names_in_dotenv_are_none_of_our_business() -> None:
    Path(".env").write_text("POSTGRES_PASSWORD=x\nHOME=/else\nWINDOW=9\n")
    assert settings.load().window == 2


# Folders.


def test_home_of_the_user_is_not_the_home_of_rushes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RUSHES_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert settings.load().home == Path.cwd() / ".rushes"


def test_what_is_not_set_lies_in_home(home: Path) -> None:
    loaded = settings.load()
    assert loaded.models_dir == home / "models"
    assert loaded.scratch_dir == home / "scratch"
    assert secret(loaded.database_url) == f"sqlite:///{home}/rushes.db"
    assert loaded.results_url.startswith(home.as_uri())
    assert loaded.host_name == socket.gethostname()


def test_folders_are_absolute_for_children_in_other_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUSHES_HOME", "here")
    monkeypatch.setenv("RUSHES_MODELS_DIR", "weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUSHES_SCRATCH_DIR", "~/scratch")
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "~/presets")
    loaded = settings.load()
    assert loaded.home == Path.cwd() / "here"
    assert loaded.models_dir == Path.cwd() / "weights"
    assert loaded.scratch_dir == tmp_path / "scratch"
    assert loaded.presets_dir == tmp_path / "presets"


@pytest.mark.parametrize("field", ["models_dir", "scratch_dir", "presets_dir", "home"])
def test_the_current_folder_may_be_given(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv(f"RUSHES_{field.upper()}", ".")
    assert getattr(settings.load(), field) == Path.cwd()


def test_a_home_of_a_user_who_has_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_HOME", "~nobody-of-this-name/x")
    with pytest.raises(errors.InvalidInput, match="RUSHES_HOME=~nobody-of-this-name/x"):
        settings.load()


@pytest.mark.parametrize("place", ["dotenv", "file", "argument"])
def test_home_is_found_wherever_it_is_set(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`up.json` is looked for there."""
    monkeypatch.delenv("RUSHES_HOME")
    home = tmp_path / "elsewhere"
    home.mkdir()
    rushes_up(home)
    given = {}
    if place == "dotenv":
        Path(".env").write_text(f"RUSHES_HOME={home}\n")
    elif place == "file":
        (tmp_path / "held").write_text(str(home))
        monkeypatch.setenv("RUSHES_HOME_FILE", str(tmp_path / "held"))
    else:
        given = {"home": str(home)}
    loaded = settings.load(**given)
    assert loaded.home == home
    assert secret(loaded.broker_url) == UP["CELERY_BROKER_URL"]


# `rushes up`.


def test_the_servers_of_a_running_rushes_up_are_used(home: Path) -> None:
    rushes_up(home)
    loaded = settings.load()
    assert loaded.results_url == "s3://rushes"
    assert loaded.s3_endpoint_url == UP["AWS_ENDPOINT_URL_S3"]
    assert secret(loaded.aws_secret_access_key) == "up-secret"


@pytest.mark.parametrize(
    "state",
    [{"pid": 2**22 + 1}, {"process_started": 1.0}, {"pid": "x"}],
    ids=["gone", "its number is used again", "odd"],
)
def test_what_a_dead_rushes_up_left_is_not_used(home: Path, state: dict[str, Any]) -> None:
    rushes_up(home, **state)
    assert broker() == "redis://127.0.0.1:6379/0"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"pid": 1}', "\x00", "7"])
def test_a_broken_up_file_is_no_up_file(home: Path, text: str) -> None:
    (home / "up.json").write_text(text)
    assert broker() == "redis://127.0.0.1:6379/0"


def test_an_up_file_without_addresses_is_no_up_file(home: Path) -> None:
    process = psutil.Process()
    state = {"pid": process.pid, "process_started": process.create_time()}
    (home / "up.json").write_text(json.dumps(state))
    assert broker() == "redis://127.0.0.1:6379/0"


FOREIGN = {
    "AWS_ENDPOINT_URL": "https://other.example",
    "AWS_ACCESS_KEY_ID": "other-key",
    "AWS_SECRET_ACCESS_KEY": "other-secret",
    "AWS_SESSION_TOKEN": "other-token",
    "AWS_DEFAULT_REGION": "eu-north-1",
    "S3_PUBLIC_ENDPOINT_URL": "https://public.example",
}


def _store(loaded: settings.Settings) -> dict[str, str | None]:
    return {
        "url": loaded.results_url,
        "endpoint": loaded.s3_endpoint_url,
        "public": loaded.s3_public_endpoint_url,
        "key": loaded.aws_access_key_id,
        "secret": secret(loaded.aws_secret_access_key),
        "token": secret(loaded.aws_session_token),
        "region": loaded.aws_region,
    }


STORE_OF_UP = {
    "url": "s3://rushes",
    "endpoint": "http://127.0.0.1:7002",
    "public": None,
    "key": "up-key",
    "secret": "up-secret",
    "token": None,
    "region": "us-east-1",
}


@pytest.mark.parametrize("inherited", [False, True], ids=["a command", "a child of rushes up"])
@pytest.mark.parametrize("place", ["environment", "dotenv"])
def test_keys_of_another_store_are_not_mixed_with_that_of_rushes_up(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str, inherited: bool
) -> None:
    rushes_up(home)
    if place == "environment":
        for name, value in FOREIGN.items():
            monkeypatch.setenv(name, value)
    else:
        Path(".env").write_text("".join(f"{name}={value}\n" for name, value in FOREIGN.items()))
    if inherited:
        for name, value in UP.items():
            monkeypatch.setenv(name, value)
    assert _store(settings.load()) == STORE_OF_UP


@pytest.mark.parametrize("place", ["environment", "dotenv", "argument"])
def test_nothing_of_the_store_of_rushes_up_is_used_beside_another(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    rushes_up(home)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    given = {}
    if place == "environment":
        monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://mine/here")
    elif place == "dotenv":
        Path(".env").write_text("RUSHES_RESULTS_URL=s3://mine/here\n")
    else:
        given = {"results_url": "s3://mine/here"}
    loaded = settings.load(**given)
    assert _store(loaded) == {
        "url": "s3://mine/here",
        "endpoint": "https://other.example",
        "public": "https://public.example",
        "key": "other-key",
        "secret": "other-secret",
        "token": "other-token",
        "region": "eu-north-1",
    }
    assert secret(loaded.broker_url) == UP["CELERY_BROKER_URL"]


def test_a_store_that_rushes_up_was_given_is_overruled_by_what_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by keys that were renewed in `.env`."""
    rushes_up(
        home, {"RUSHES_RESULTS_URL": "s3://ours", "AWS_ENDPOINT_URL_S3": "https://old.example"}
    )
    Path(".env").write_text("AWS_ACCESS_KEY_ID=new-key\nAWS_SECRET_ACCESS_KEY=new-secret\n")
    found = _store(settings.load())
    assert (found["url"], found["endpoint"]) == ("s3://ours", "https://old.example")
    assert (found["key"], found["secret"]) == ("new-key", "new-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://new.example")
    assert settings.load().s3_endpoint_url == "https://new.example"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://ours")
    assert settings.load().s3_endpoint_url is None, "a store's values come from one place"


def test_a_rushes_up_without_a_store_of_its_own_gives_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rushes_up(home, {"CELERY_BROKER_URL": UP["CELERY_BROKER_URL"]})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    assert settings.load().aws_access_key_id == "mine"


# Values.


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgres://u:p@h/d", "postgresql+psycopg://u:p@h/d"),
        ("postgresql://u:p@h/d?sslmode=require", "postgresql+psycopg://u:p@h/d?sslmode=require"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg://h/d"),
        ("sqlite:///x.db", "sqlite:///x.db"),
    ],
)
def test_addresses_of_postgresql_name_our_driver(
    monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", given)
    assert secret(settings.load().database_url) == used


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RUSHES_WINDOW", "many"),
        ("RUSHES_WINDOW", "0"),
        ("RUSHES_WINDOW", "1001"),
        ("RUSHES_LEASE_SECONDS", "0"),
        ("RUSHES_LEASE_SECONDS", "inf"),
        ("RUSHES_LEASE_SECONDS", "nan"),
        ("RUSHES_LEASE_SECONDS", "1e300"),
        ("RUSHES_MAX_ERRORS", "0"),
        ("RUSHES_MAX_ERRORS", "100000"),
        ("RUSHES_RETRY_SECONDS", "-1"),
        ("RUSHES_TICK_SECONDS", "0"),
        ("RUSHES_MODELS_DIR", "~nobody-of-this-name/x"),
        ("RUSHES_PRESETS_DIR", "~nobody-of-this-name"),
        ("RUSHES_HOST", "one,two"),
        ("RUSHES_HOST", "%h"),
        ("LOG_LEVEL", "LOUD"),
        ("RUSHES_LOG_FORMAT", "xml"),
        ("RUSHES_WEB_NAMES", "https://gpu.example"),
        ("RUSHES_WEB_NAMES", "gpu.example:8000"),
        ("RUSHES_WEB_NAMES", "gpu.example/farm"),
        ("RUSHES_WEB_NAMES", "*"),
        ("RUSHES_WEB_CORS_ORIGINS", "*"),
        ("RUSHES_WEB_CORS_ORIGINS", "null"),
        ("RUSHES_WEB_CORS_ORIGINS", "app.example"),
        ("RUSHES_WEB_CORS_ORIGINS", "https://app.example/"),
        ("RUSHES_WEB_CORS_ORIGINS", "https://*.example"),
    ],
)
@pytest.mark.parametrize("place", ["environment", "dotenv", "file"])
def test_a_bad_value_is_told_by_the_name_it_was_given_under(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, place: str
) -> None:
    if place == "environment":
        monkeypatch.setenv(name, value)
    elif place == "dotenv":
        Path(".env").write_text(f"{name}={value}\n")
    else:
        (tmp_path / "held").write_text(value)
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "held"))
    with pytest.raises(errors.InvalidInput) as caught:
        settings.load()
    (problem,) = caught.value.problems
    assert name in problem.message
    assert value in problem.message


@pytest.mark.parametrize("name", ["RUSHES_STALL_SECONDS", "RUSHES_HEARTBEAT_SECONDS"])
@pytest.mark.parametrize("value", ["0", "inf", "nan", "1e10"])
def test_a_wait_that_no_timer_can_keep_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    from worker import settings as worker_settings

    monkeypatch.setenv(name, value)
    with pytest.raises(errors.InvalidInput, match=name):
        worker_settings.load()


def test_every_bad_value_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_WINDOW", "x")
    monkeypatch.setenv("RUSHES_TICK_SECONDS", "y")
    with pytest.raises(errors.InvalidInput) as caught:
        settings.load()
    assert len(caught.value.problems) == 2


def test_secrets_are_in_no_message_and_no_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@h/d")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:hunter2@h/0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2")
    loaded = settings.load()
    assert "hunter2" not in f"{loaded} {loaded!r} {loaded.model_dump()}"
    monkeypatch.setenv("RUSHES_WINDOW", "x")
    with pytest.raises(errors.InvalidInput) as caught:
        settings.load()
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("\udcff", "must be printable"),
        ("one\ttwo", "must be printable"),
        (" here", "blanks at its ends"),
        ("x" * 181, "at most 180 characters"),
        ("\u65e5" * 30, "at most 180 characters"),
    ],
)
def test_a_host_that_no_queue_can_be_named_after_is_told(
    monkeypatch: pytest.MonkeyPatch, value: str, told: str
) -> None:
    monkeypatch.setenv("RUSHES_HOST", value)
    with pytest.raises(errors.InvalidInput, match=f"RUSHES_HOST.* {told}"):
        settings.load()


@pytest.mark.parametrize("name", ["a.b-c.local", "x" * 64, "two words", "K\xf6ln@2"])
def test_a_usual_host_name_is_good_also_when_it_is_given(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("RUSHES_HOST", name)
    assert settings.load().host_name == name


@pytest.mark.parametrize("name", ["a,b", " %h", "\xe9" * 64, "\udcff", "x" * 255, "here"])
def test_the_name_of_the_machine_is_always_taken(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    assert (settings.load().host_name == name) is (name == "here")


def test_blanks_around_an_owner_make_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_OWNER", " bob  b ")
    assert settings.load().owner == "bob  b"
    monkeypatch.setenv("RUSHES_OWNER", "   ")
    with pytest.raises(errors.InvalidInput, match=r"RUSHES_OWNER: .* not blank"):
        settings.load()


def test_levels_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "debug")
    assert settings.load().log_level == "DEBUG"


def test_names_that_are_given_are_known(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rushes_up(home)
    monkeypatch.setenv("REDIS_URL", "redis://x/0")
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "x"))
    Path(".env").write_text("RUSHES_WINDOW=3\nRUSHES_RESULTS_URL=\n")
    assert settings.given_names() == {"RUSHES_HOME", "REDIS_URL", "DATABASE_URL", "RUSHES_WINDOW"}


def test_names_in_small_letters_are_given_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("database_url", "sqlite:///x.db")
    assert secret(settings.load().database_url) == "sqlite:///x.db"
    assert "DATABASE_URL" in settings.given_names()


# Names that are none.


def unread() -> list[tuple[str, str, str | None]]:
    return [(each.name, each.place, each.nearest) for each in misspelt.find()]


def test_a_name_that_is_no_setting_is_found_with_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUSHES_X264_CFR", "20")
    monkeypatch.setenv("RUSHES_REDIS_URL", "redis://h")
    Path(".env").write_text("RUSHES_LEASE_SECOND=50\nRUSHES_X264_CFR=20\nRUSHES_QQQ=1\nX=1\n")
    assert unread() == [
        ("RUSHES_REDIS_URL", "environment", "REDIS_URL"),
        ("RUSHES_X264_CFR", "environment", "RUSHES_X264_CRF"),
        ("RUSHES_LEASE_SECOND", ".env", "RUSHES_LEASE_SECONDS"),
        ("RUSHES_QQQ", ".env", None),
    ]


def test_every_way_to_name_a_setting_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("rushes_window", "3")
    monkeypatch.setenv("RUSHES_OWNER_FILE", "/run/secrets/owner")
    monkeypatch.setenv("RUSHES_MADE_UP", "")  # no value
    Path(".env").write_text("RUSHES_DTYPE=float32\nrushes_window=4\nRUSHES_MADE_UP=\n")
    assert unread() == []


@pytest.mark.parametrize(
    ("name", "place"), [("RUSHES_DTYPE_FILE", "environment"), ("RUSHES_OWNER_FILE", ".env")]
)
def test_a_file_is_named_for_no_setting_of_rendering_and_not_in_dotenv(
    monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    if place == "environment":
        monkeypatch.setenv(name, "/run/secrets/x")
    else:
        Path(".env").write_text(f"{name}=/run/secrets/x\n")
    assert unread() == [(name, place, name.removesuffix("_FILE"))]


def test_no_name_that_the_repository_reads_is_taken_for_a_mistake() -> None:
    folders = ("jobs", "worker", "models", "benchmarks", "deploy", "tests/chaos")
    kinds = ("*.py", "*.yaml", "*.yml", "*.service")
    files = [path for f in folders for kind in kinds for path in (REPOSITORY / f).rglob(kind)]
    files += [REPOSITORY / name for name in ("Makefile", "docker-compose.yml", ".env.example")]
    text = "\n".join(path.read_text("utf-8") for path in files)
    found = set(re.findall(r"\bRUSHES_[A-Z0-9_]*[A-Z0-9]\b", text))
    assert found - misspelt.known_names() == set()


# Documentation.

# What a table says where the default is not a plain value.
DEFAULTS_IN_WORDS = {
    "RUSHES_OWNER": "the user of the operating system",
    "DATABASE_URL": "`rushes.db` in `RUSHES_HOME`",
    "RUSHES_MODELS_DIR": "`models` in `RUSHES_HOME`",
    "RUSHES_SCRATCH_DIR": "`scratch` in `RUSHES_HOME`",
    "RUSHES_HOST": "the machine's host name",
}


def _documented() -> dict[tuple[str, ...], str]:
    text = (REPOSITORY / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[A-Z0-9_`, ]+`) \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE)
    return {tuple(re.findall(r"[A-Z0-9_]+", names)): default for names, default in rows}


def _default_in_words(names: tuple[str, ...], default: Any, home: Path) -> str:
    if names[0] in DEFAULTS_IN_WORDS:
        return DEFAULTS_IN_WORDS[names[0]]
    if names[0] == "RUSHES_RESULTS_URL":
        inside = settings.load().results_url.removeprefix(f"{home.as_uri()}/")
        return f"`{inside}` in `RUSHES_HOME`"
    if default is None:
        return "none"
    shown = default.get_secret_value() if hasattr(default, "get_secret_value") else default
    return f"`{shown:g}`" if isinstance(shown, float) else f"`{shown}`"


def test_every_setting_and_its_default_is_documented(home: Path) -> None:
    from worker import settings as worker_settings

    expected = {}
    for model in (settings.Settings, worker_settings.WorkerSettings):
        for info in model.model_fields.values():
            names = tuple(str(choice) for choice in info.validation_alias.choices)  # type: ignore[union-attr]
            default = None if info.default is PydanticUndefined else info.default
            expected[names] = _default_in_words(names, default, home)
    assert _documented() == expected


def test_the_defaults_in_words_are_the_defaults(home: Path) -> None:
    loaded = settings.load()
    assert secret(loaded.database_url) == f"sqlite:///{home / 'rushes.db'}"
    assert loaded.models_dir == home / "models"
    assert loaded.scratch_dir == home / "scratch"
    assert loaded.host_name == os.uname().nodename
    assert loaded.owner == getpass.getuser()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("redis://h/0", "redis://h/0"),
        ("rediss://:p%2Fw@h:1/0", "rediss://:p%2Fw@h:1/0?ssl_cert_reqs=required"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h?ssl_cert_reqs=none"),
        ("rediss://h?ssl_cert_reqs=", "rediss://h?ssl_cert_reqs=required"),
        ("rediss://h#x", "rediss://h?ssl_cert_reqs=required#x"),
        ("rediss://h?x", "rediss://h?ssl_cert_reqs=required&x="),
        ("rediss://[", "rediss://[?ssl_cert_reqs=required"),
    ],
)
def test_redis_with_tls_is_asked_for_a_certificate(
    monkeypatch: pytest.MonkeyPatch, given: str, meant: str
) -> None:
    monkeypatch.setenv("REDIS_URL", given)
    assert broker() == meant
    assert settings.redis_url(meant) == meant
