"""The results store: it is the farm's, and takes, tells and gives what we put."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from botocore import auth
from click.testing import CliRunner

from jobs import (
    cli,
    database,
    folder_store,
    s3_store,
    servers,
    settings,
    storage,
    store_mark,
    stores,
)
from jobs.doctor import results
from tests.told import told_by


def test_a_results_folder_takes_objects_and_is_left_clean() -> None:
    assert told_by(results.check)["results store"].status == "ok"
    left = [path for path in (settings.load().home / "results").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.timeout(120)
def test_a_real_store_passes(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    found = told_by(results.check)
    for name in ("results store", "results links"):
        assert found[name].status == "ok", found[name]
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    links = told_by(results.check)["results links"]
    assert links.status == "warn", links
    assert "until the temporary credentials end" in links.seen


def test_a_store_that_is_not_the_farms_fails(
    db: database.Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings.load()
    store_mark.Guard(db, stores.open_store(config)).leave()
    assert "results store of the farm" not in told_by(results.check)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("RUSHES_RESULTS_URL", (tmp_path / "elsewhere").as_uri())
    found = told_by(results.check)["results store of the farm"]
    assert found.status == "fail"
    assert f"is not the store of this farm, {config.results_url}" in found.seen
    result = CliRunner().invoke(cli.main, ["migrate", "--store"])
    assert result.exit_code == 0, result.output
    assert "restart what runs" in result.output
    again = CliRunner().invoke(cli.main, ["migrate", "--store"])
    assert again.output.startswith(f"already {(tmp_path / 'elsewhere').as_uri()}: nothing changed")
    assert "restart" not in again.output
    as_json = CliRunner().invoke(cli.main, ["migrate", "--store", "-o", "json"])
    assert json.loads(as_json.stdout)["changed"] is False
    assert "results store of the farm" not in told_by(results.check)
    monkeypatch.delenv("RUSHES_RESULTS_URL")
    assert told_by(results.check)["results store of the farm"].status == "fail"


def test_a_results_url_that_is_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_RESULTS_URL", "ftp://x")
    assert told_by(results.check)["results store"].status == "fail"


def test_a_bucket_that_keeps_versions_is_told_and_one_that_does_not_say_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> bool:
        raise storage.StorageDenied("s3://b", "403 AccessDenied")

    assert "results versions" not in told_by(results.check)
    monkeypatch.setattr(folder_store.FolderStore, "keeps_versions", refuse)
    found = told_by(results.check)
    assert "results versions" not in found
    assert found["results store"].status == "ok"
    monkeypatch.setattr(folder_store.FolderStore, "keeps_versions", lambda _: True)
    check = told_by(results.check)["results versions"]
    assert (check.status, check.advice) == ("warn", "add a lifecycle rule for noncurrent versions")


def test_a_store_that_may_not_be_listed_says_which_right_is_missing(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    head = s3_store.S3Store.head

    def refuse(store: storage.ObjectStore, _prefix: str = "") -> Iterator[storage.ObjectEntry]:
        raise storage.StorageDenied(store.url, "answers 403 AccessDenied")

    def head_or_refusal(store: s3_store.S3Store, key: str) -> storage.ObjectHead:
        found = head(store, key)
        if found is None:
            raise storage.StorageDenied(store.url, "answers 403 AccessDenied")
        return found

    monkeypatch.setattr(s3_store.S3Store, "entries", refuse)
    monkeypatch.setattr(s3_store.S3Store, "head", head_or_refusal)
    found = told_by(results.check)
    assert found["results listing"].status == "fail"
    assert found["results listing"].advice == "allow s3:ListBucket (on the bucket)"
    assert found["results store"].status == "ok"
    assert found["results links"].status == "ok"


def test_a_clock_that_the_store_refuses_is_no_matter_of_keys(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    hour_ago = auth.get_current_datetime() - timedelta(hours=1)
    monkeypatch.setattr(auth, "get_current_datetime", lambda: hour_ago)
    found = told_by(results.check)["results store"]
    assert found.status == "fail"
    assert found.advice.startswith("run NTP")


class OwnAuthority(servers.S3Server):
    """With a certificate that no machine trusts by itself."""

    def _command(self) -> Sequence[str]:
        files = (f"--{name}={self.folder / name}" for name in ("cert", "key"))
        return [*super()._command(), *files]

    @property
    def endpoint_url(self) -> str:
        return super().endpoint_url.replace("http:", "https:")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")
def test_a_store_with_a_certificate_of_its_own_passes_where_its_authority_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=store"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")),
        ],
        check=True,
        capture_output=True,
    )
    with OwnAuthority.start(tmp_path) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_CA_BUNDLE", "")
        untrusted = told_by(results.check)["results store"]
        assert "CERTIFICATE_VERIFY_FAILED" in untrusted.seen
        assert untrusted.advice == results.NOT_TRUSTED
        Path(".env").write_text(f"AWS_CA_BUNDLE={tmp_path / 'cert'}\n")
        found = told_by(results.check)
        assert found["results store"].status == "ok"
        assert found["results links"].status == "ok"
        monkeypatch.setattr(results, "_trust", lambda _config: None)
        links = told_by(results.check)["results links"]
        assert links.status == "fail"
        assert "AWS_CA_BUNDLE" in links.advice
