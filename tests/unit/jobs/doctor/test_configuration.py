"""The settings: what is given, where it comes from, and what is misspelt."""

from pathlib import Path

import pytest

from jobs import settings
from jobs.doctor import configuration, examination
from tests.told import told_by


def test_a_name_that_is_no_setting_is_told() -> None:
    Path(".env").write_text("RUSHES_LEASE_SECOND=50\nRUSHES_QQQ=1\n")
    found = told_by(configuration.check_misspelt)
    told = found["setting RUSHES_LEASE_SECOND"]
    assert (told.status, told.seen) == ("warn", "there is no such setting (.env)")
    assert "did you mean RUSHES_LEASE_SECONDS?" in told.advice
    assert "did you mean" not in found["setting RUSHES_QQQ"].advice


def test_settings_are_shown_with_their_source_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("secret").write_text("postgres://me:hidden@127.0.0.1:1/db")
    monkeypatch.setenv("DATABASE_URL_FILE", "secret")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:secret@127.0.0.1:1/0")
    Path(".env").write_text("RUSHES_WINDOW=5\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    found = {check.name: check for check in examination.examine()}
    assert found["setting DATABASE_URL"].seen.endswith("(file named by DATABASE_URL_FILE)")
    assert found["setting RUSHES_WINDOW"].seen == "5 (.env)"
    assert found["setting CELERY_BROKER_URL"].seen.startswith("redis://127.0.0.1:1/0 (environment")
    everything = " ".join(check.seen for check in found.values())
    assert "hidden" not in everything
    assert "secret@" not in everything


def test_a_name_in_small_letters_is_shown_as_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("RUSHES_WINDOW=5\nRUSHES_DTYPE=float16\n")
    monkeypatch.setenv("rushes_window", "6")
    monkeypatch.setenv("rushes_dtype", "float32")
    found = told_by(configuration.check) | told_by(configuration.check_rendering)
    assert found["setting RUSHES_WINDOW"].seen == "6 (environment RUSHES_WINDOW)"
    assert found["setting RUSHES_DTYPE"].seen == "float32 (environment RUSHES_DTYPE)"


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("redis://", "redis://localhost:6379 "),
        ("redis://:hidden@[::1]/1", "redis://[::1]:6379/1 "),
        ("localhost:6379", "not an address of Redis "),
        ("me:hidden@localhost", "not an address of Redis "),
        ("redis://:hidden@[::1", "not an address of Redis "),
    ],
)
def test_the_broker_is_shown_as_it_is_reached(
    monkeypatch: pytest.MonkeyPatch, url: str, seen: str
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    found = configuration.check(settings.load())
    (shown,) = [check.seen for check in found if check.name == "setting CELERY_BROKER_URL"]
    assert shown.startswith(seen)


def test_proxies_that_are_none_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be meant for another program of this machine."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "unix:")
    found = told_by(configuration.check)["proxies"]
    assert (found.status, "'unix:' does not appear" in found.seen) == ("warn", True)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1,")
    assert "proxies" not in told_by(configuration.check)


def test_settings_of_rendering_are_shown_where_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("RUSHES_X264_PRESET=slow\n")
    monkeypatch.setenv("RUSHES_DTYPE", "float32")
    found = told_by(configuration.check_rendering)
    assert found["setting RUSHES_X264_PRESET"].seen == "slow (.env)"
    assert found["setting RUSHES_DTYPE"].seen == "float32 (environment RUSHES_DTYPE)"
    assert "setting RUSHES_ENCODER" not in found
    monkeypatch.setenv("RUSHES_C2PA_TIMESTAMP_URL", "https://me:hidden@tsa.example/ts")
    assert told_by(configuration.check_rendering)[
        "setting RUSHES_C2PA_TIMESTAMP_URL"
    ].seen.startswith("https://***@tsa.example/")
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", "~/bad")
    shown = told_by(configuration.check_rendering)["setting RUSHES_SIM_BAD_DEVICES"].seen
    assert shown.startswith(str(Path("~/bad").expanduser()))
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", "~nobody-of-this-name/bad")
    assert (
        "RUSHES_SIM_BAD_DEVICES"
        in told_by(configuration.check_rendering)["rendering settings"].seen
    )
    monkeypatch.delenv("RUSHES_SIM_BAD_DEVICES")
    monkeypatch.setenv("RUSHES_C2PA_CERTIFICATE", "nowhere.pem")
    assert (
        "RUSHES_C2PA_KEY belong together"
        in told_by(configuration.check_rendering)["rendering settings"].seen
    )
    monkeypatch.setenv("RUSHES_DTYPE", "foo")
    check = told_by(configuration.check_rendering)["rendering settings"]
    assert check.status == "fail"
    assert "RUSHES_DTYPE" in check.seen


def test_a_setting_that_rushes_up_left_empty_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = {"RUSHES_RESULTS_URL": "s3://b", "AWS_SESSION_TOKEN": "", "AWS_ACCESS_KEY_ID": "me"}
    monkeypatch.setattr(settings, "read_up_file", lambda _home: store)
    config = settings.load()
    shown = {check.name for check in configuration.check(config)}
    assert "setting AWS_ACCESS_KEY_ID" in shown
    assert "setting AWS_SESSION_TOKEN" not in shown


def test_each_value_of_the_store_has_the_place_that_it_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def places() -> set[str]:
        checks = configuration.check(settings.load())
        return {c.seen for c in checks if c.name.startswith(("setting RUSHES_RES", "setting AWS"))}

    up = {"RUSHES_RESULTS_URL": "s3://bbb", "AWS_REGION": "eu-west-1"}
    monkeypatch.setattr(settings, "read_up_file", lambda _home: up)
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    assert places() == {
        "s3://bbb (running `rushes up`, RUSHES_RESULTS_URL)",
        "eu-west-2 (environment AWS_REGION)",
        "mine (environment AWS_ACCESS_KEY_ID)",
    }
    up["AWS_ACCESS_KEY_ID"] = "its"  # now it runs that store
    monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://bbb")  # as its children have it
    assert places() == {
        "s3://bbb (running `rushes up`, RUSHES_RESULTS_URL)",
        "eu-west-1 (running `rushes up`, AWS_REGION)",
        "its (running `rushes up`, AWS_ACCESS_KEY_ID)",
    }
