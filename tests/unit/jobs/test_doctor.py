"""`rushes doctor` looks at real parts and says what to do."""

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import json5
import psycopg
import pytest
import redis
import safetensors.torch
import torch
from botocore import auth
from click.testing import CliRunner
from sqlalchemy import text

from jobs import (
    cli,
    database,
    doctor,
    folder_store,
    migrate,
    presets,
    s3_store,
    semaphores,
    servers,
    settings,
    storage,
    store_mark,
    stores,
    workers,
)
from models import lora_keys
from models.tiny import shipped
from tests.registrations import registration
from worker import host_memory


@pytest.fixture(autouse=True)
def _broker_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:secret@127.0.0.1:1/0")


def checks() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def migrated() -> None:
    migrate.upgrade(database.connect(settings.load()))


def test_every_check_that_is_not_ok_says_what_to_do() -> None:
    found = checks()
    assert {check.status for check in found.values()} == {"ok", "warn", "fail"}
    for check in found.values():
        assert bool(check.advice) == (check.status != "ok"), check


def test_a_missing_database_fails_and_is_not_made() -> None:
    found = checks()
    assert found["database"].status == "fail"
    assert "rushes migrate" in found["database"].advice
    assert not (settings.load().home / "rushes.db").exists()


def test_a_database_on_a_disk_that_is_read_only_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    migrated()
    prepare = database._use_wal

    def of_read_only(connection: sqlite3.Connection) -> None:
        prepare(connection)
        connection.execute("PRAGMA query_only=ON")

    monkeypatch.setattr(database, "_use_wal", of_read_only)
    found = checks()
    assert (found["database"].status, found["database writes"].status) == ("ok", "fail")
    assert "readonly" in found["database writes"].seen


def test_a_database_on_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    migrated()
    monkeypatch.setattr(database, "LEAST_FREE_BYTES", 1 << 60)
    found = checks()["database writes"]
    assert (found.status, "MB are free for" in found.seen) == ("fail", True)
    assert "disk room" in found.advice


@pytest.mark.parametrize("is_pooled", [True, False])
def test_a_pooler_before_the_database_is_named(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch, *, is_pooled: bool
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_database_url)
    if is_pooled:
        monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: -1))
    found = checks()["database"]
    assert (found.status, found.seen.endswith(", through a pooler")) == ("ok", is_pooled)


def test_old_tables_fail() -> None:
    database.connect(settings.load()).engine.connect().close()
    assert checks()["database tables"].status == "fail"
    migrated()
    assert checks()["database tables"].status == "ok"


def test_tables_of_a_newer_version_are_no_failure() -> None:
    """`rushes migrate` would not change them."""
    migrated()
    with database.connect(settings.load()).transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = checks()["database tables"]
    assert found.status == "warn"
    assert "rushes migrate" not in found.advice


@pytest.mark.parametrize("url", ["nonsense", "postgres://127.0.0.1:1/db", "mysql://x/y"])
def test_a_wrong_database_fails_and_the_other_checks_go_on(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    found = checks()
    assert found["database"].status == "fail"
    assert "dispatcher" in found


def test_a_redis_that_is_down_fails() -> None:
    assert checks()["redis"].status == "fail"


def test_a_cluster_fails(redis_cluster_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", redis_cluster_url)
    found = checks()["redis"]
    assert (found.status, "Cluster" in found.seen) == ("fail", True), found


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("REPLICAOF 127.0.0.1 1", "a replica of 127.0.0.1:1"),
        ("CONFIG SET maxmemory 1", "used memory > 'maxmemory'"),
        ("CONFIG SET min-replicas-to-write 1", "not enough good replicas"),
    ],
)
def test_a_redis_that_answers_and_takes_nothing_fails_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, seen: str
) -> None:
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        monkeypatch.setenv("CELERY_BROKER_URL", server.url)
        assert checks()["redis"].status == "ok"
        assert client.keys() == []
        client.execute_command(*change.split())
        found = checks()["redis"]
    assert (found.status, seen.lower() in found.seen.lower()) == ("fail", True), found


def test_a_redis_that_cannot_write_to_its_disk_fails_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses even a ping."""
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        (server.folder / "dump.rdb").mkdir()  # it cannot replace a folder by a snapshot
        client.config_set("save", "3600 1")
        client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.02)
        monkeypatch.setenv("CELERY_BROKER_URL", server.url)
        found = checks()["redis"]
    assert found.seen.startswith("it answers, but takes no writes: "), found
    assert "MISCONF" in found.seen
    assert "Redis takes nothing" in found.advice


@pytest.mark.parametrize(
    ("rights", "name", "status", "seen"),
    [
        ("~rushes.* &* +@all", "redis", "fail", "the key _kombu.binding.rushes.pidbox, the key _"),
        ("~rushes.* ~_kombu.* &* +@all", "redis", "fail", "needs: the key trial.rushes.pidbox"),
        ("~* +@all", "redis", "fail", "Celery needs: the channel /0.rushes.pidbox"),
        ("~rushes.* &* +@all -@dangerous", "redis", "fail", "the key _kombu.binding.rushes.pidbox"),
        ("~rushes.* %R~* &* +@all", "redis", "fail", "needs: the key _kombu.binding.rushes.pidbox"),
        ("~* &* +@all -zrem", "redis", "fail", "Celery needs: the key rushes.unacked_index"),
        ("~* &* +@all -publish", "redis", "fail", "Celery needs: the channel /0.rushes.pidbox"),
        ("~* &* +@all -@scripting -@dangerous", "redis", "fail", "Celery needs: scripts"),
        ("~* &* +@all -@dangerous", "redis settings", "warn", "cannot tell eviction"),
    ],
)
def test_a_user_of_redis_that_may_too_little_is_told_what_to_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rights: str,
    name: str,
    status: str,
    seen: str,
) -> None:
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        client.execute_command("ACL", "SETUSER", "me", "on", ">pw", *rights.split())
        monkeypatch.setenv("CELERY_BROKER_URL", f"redis://me:pw@127.0.0.1:{server.port}/0")
        (found,) = (check for check in checks().values() if "ACL SETUSER" in check.advice)
        assert (found.name, found.status, seen in found.seen) == (name, status, True), found
        client.execute_command(*found.advice.replace("NAME", "me").split())
        found = checks()["redis"]
        assert (found.status, "redis eviction" in checks()) == ("ok", True), found
        assert client.keys() == []


def test_workers_of_a_host_without_models_are_told() -> None:
    migrated()
    db = database.connect(settings.load())
    db.write(workers.register, registration("gpu0@a"))
    assert checks()["workers"].status == "ok"
    db.write(workers.register, registration("gpu0@b", queues=()))
    found = checks()["workers"]
    assert (found.status, "gpu0@b" in found.seen, "gpu0@a" in found.seen) == ("warn", True, False)


def test_a_results_folder_takes_objects_and_is_left_clean() -> None:
    assert checks()["results store"].status == "ok"
    left = [path for path in (settings.load().home / "results").rglob("*") if path.is_file()]
    assert left == []


def test_a_store_that_is_not_the_farms_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated()
    config = settings.load()
    db = database.connect(config)
    store_mark.Guard(db, stores.open_store(config)).leave()
    assert "results store of the farm" not in checks()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("RUSHES_RESULTS_URL", (tmp_path / "elsewhere").as_uri())
    found = checks()["results store of the farm"]
    assert found.status == "fail"
    assert f"is not the store of this farm, {config.results_url}" in found.seen
    result = CliRunner().invoke(cli.main, ["migrate", "--store"])
    assert result.exit_code == 0, result.output
    assert "results store of the farm" not in checks()
    monkeypatch.delenv("RUSHES_RESULTS_URL")
    assert checks()["results store of the farm"].status == "fail"


def test_a_results_url_that_is_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_RESULTS_URL", "ftp://x")
    assert checks()["results store"].status == "fail"


def test_a_machine_whose_shared_memory_is_full_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks()["shared memory"].status == "ok"
    monkeypatch.setattr(semaphores, "refusal", lambda: "no semaphore can be made: [Errno 28] ...")
    found = checks()["shared memory"]
    assert (found.status, "--shm-size" in found.advice) == ("fail", True)


def test_ffmpeg_is_there() -> None:
    assert checks()["ffmpeg"].status == "ok"


def test_a_name_that_is_no_setting_is_told() -> None:
    Path(".env").write_text("RUSHES_LEASE_SECOND=50\nRUSHES_QQQ=1\n")
    found = checks()
    told = found["setting RUSHES_LEASE_SECOND"]
    assert (told.status, told.seen) == ("warn", "there is no such setting (.env)")
    assert "did you mean RUSHES_LEASE_SECONDS?" in told.advice
    assert "did you mean" not in found["setting RUSHES_QQQ"].advice


def test_missing_and_incomplete_weights_are_told() -> None:
    folder = settings.load().models_dir / "tiny"
    missing = checks()["weights elsewhere"].seen
    assert missing.startswith(f"there is no folder {folder.parent}: ")
    assert "tiny (for 2 presets)" in missing
    folder.mkdir(parents=True)
    assert checks()["weights elsewhere"].seen.startswith(f"not in {folder.parent}: ")
    (folder / "config.json").write_text("{}")
    assert checks()["weights tiny"].status == "warn"
    assert "complete the folder" in checks()["weights tiny"].advice


def test_a_preset_with_other_steps_than_its_weights_were_distilled_for_is_told() -> None:
    folder = settings.load().models_dir / "tiny"
    shipped.copy("tiny", folder)
    assert checks()["weights tiny"].status == "ok"
    path = folder / "distill_models" / "distill_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"denoising_step_list": "[1000, 500]"})
    found = checks()["weights tiny"]
    assert found.status == "warn"
    assert f"{path} was distilled for denoising_step_list [1000, 500], the preset" in found.seen


def test_keys_of_a_lora_that_are_passed_over_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of Wan2.1's image-to-video on a model that is laid out as Wan2.2's."""
    root = settings.load().models_dir / "wan22"
    shipped.copy("tiny_i2v", root)
    transformer = root / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(transformer)
    for_images = set(lora_keys.for_images(tensors))
    for name in ("high_noise_model", "low_noise_model"):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "config.json").read_bytes())
        kept = {key: tensors[key] for key in tensors.keys() - for_images}
        safetensors.torch.save_file(kept, root / name / transformer.name)
    shutil.rmtree(root / "distill_models")
    lora = "wan22/loras/distill_lora.safetensors"
    preset = json5.loads(presets.load("wan_moe_i2v_distill_with_lora").path.read_text())
    use = {"name": "low_noise_model", "path": lora}
    preset |= {"task": "i2v", "model_path": "wan22", "lora_configs": [use]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.json").write_text(json.dumps(preset))
    monkeypatch.setenv("RUSHES_PRESETS_DIR", str(tmp_path / "mine"))
    keys = [f"diffusion_model.blocks.0.cross_attn.{name}.diff" for name in ("k", "k_img", "v_img")]
    safetensors.torch.save_file({key: torch.zeros(1) for key in keys}, root.parent / lora)
    found = checks()["weights mine"]
    assert found.status == "ok"
    assert f"; 2 keys of {lora} are passed over: they are for Wan2.1's image" in found.seen


def add_e5m2(folder: Path) -> None:
    path = folder / "distill_models" / "distill_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "blocks.0.ffn.0.weight"
    safetensors.torch.save_file(tensors | {name: tensors[name].to(torch.float8_e5m2)}, path)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 7}))


def leave_the_vocabulary(folder: Path) -> None:
    tokenizer = folder / "google" / "umt5-xxl"
    (tokenizer / "tokenizer.json").rename(tokenizer / "spiece.model")


def point_with_git_lfs(folder: Path) -> None:
    (folder / "Wan2.1_VAE.pth").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (add_e5m2, "blocks.0.ffn.0.weight is F8_E5M2"),
        (change_config, "describes 7 blocks"),
        (leave_the_vocabulary, "expected tokenizer.json"),
        (point_with_git_lfs, "Wan2.1_VAE.pth: cannot be read as weights: it is a Git LFS pointer"),
    ],
)
def test_weights_that_every_job_would_fail_on_are_told(
    spoil: Callable[[Path], None], seen: str
) -> None:
    folder = settings.load().models_dir / "tiny"
    shipped.copy("tiny", folder)
    spoil(folder)
    (fit,) = doctor.fits(settings.load(), "tiny")
    for check, status in ((checks()["weights tiny"], "warn"), (fit, "fail")):
        assert (check.status, seen in check.seen) == (status, True), check


@pytest.mark.parametrize(
    ("lora", "seen"),
    [
        ("loras/nowhere.safetensors", "tiny: expected the LoRA at "),
        ("images.safetensors", "It was made for image-to-video"),
        ("style.pt", "LoRA files are read as .safetensors only"),
        ("damaged.safetensors", "damaged.safetensors: cannot be read as weights"),
    ],
)
def test_a_lora_that_every_job_would_fail_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str, seen: str
) -> None:
    models = settings.load().models_dir
    shipped.copy("tiny", models / "tiny")
    key = "diffusion_model.img_emb.proj.1.lora_up.weight"
    safetensors.torch.save_file({key: torch.zeros(1)}, models / "images.safetensors")
    (models / "style.pt").touch()
    (models / "damaged.safetensors").write_bytes(b"no weights")
    asked = json5.loads(presets.load("tiny").path.read_text())
    path = tmp_path / "presets" / "styled.json"
    path.parent.mkdir()
    path.write_text(json.dumps(asked | {"lora_configs": [{"path": lora}]}))
    (fit,) = doctor.fits(settings.load(), str(path))
    monkeypatch.setenv("RUSHES_PRESETS_DIR", str(path.parent))
    for check, status in ((checks()["weights styled"], "warn"), (fit, "fail")):
        assert (check.status, seen in check.seen) == (status, True), check


def test_a_preset_that_parks_weights_is_judged_by_main_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sizes in the files, against what this process may still take."""
    tiny = settings.load().models_dir / "tiny"
    subprocess.run([sys.executable, "-m", "models.tiny.make", str(tiny)], check=True)
    look = {**json5.loads(presets.load("tiny").path.read_text()), "cpu_offload": True}
    (tmp_path / "parked.json").write_text(json.dumps(look))
    weights = sum(path.stat().st_size for path in tiny.rglob("*.safetensors"))
    for free_bytes, status in ((weights // 100, "fail"), (1 << 40, "ok")):
        free = host_memory.HostMemory(total_bytes=1 << 41, free_bytes=free_bytes)
        monkeypatch.setattr(host_memory, "now", lambda free=free: free)
        *_, check = doctor.fits(settings.load(), str(tmp_path / "parked.json"))
        assert (check.name, check.status) == ("fit parked, main memory", status)
        assert "GB are free" in check.seen


def test_a_preset_that_does_not_fit_fails_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of a few megabytes, a GPU of one, as nvidia-smi would tell it."""
    make_tiny = [sys.executable, "-m", "models.tiny.make"]
    subprocess.run([*make_tiny, str(settings.load().models_dir / "tiny")], check=True)
    for memory_mib, status in ((1, "fail"), (80_000, "ok")):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        row = f"0, GPU-1, Small GPU, {memory_mib}"
        program.write_text(f"#!/bin/sh\necho '{row}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        (check,) = doctor.fits(settings.load(), "tiny")
        assert check.status == status, check.seen
        assert "GPU 0 (Small GPU): needs about 0.7 GB" in check.seen


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`driver(words, status)`: an nvidia-smi that answers so; torch is of CUDA 13."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: "13.0")

    def put(words: str, status: int = 0) -> None:
        program.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(words)}\nexit {status}\n")
        program.chmod(0o755)

    return put


GPUS = (
    "0, NVIDIA H100 80GB HBM3, 81559 MiB, 81076 MiB, 580.95.05\n"
    "1, NVIDIA H100 80GB HBM3, 81559 MiB, 81076 MiB, 580.95.05\n"
)
LOST = "Unable to determine the device handle for GPU2: 0000:3B:00.0: GPU is lost\n"


@pytest.mark.parametrize(
    ("words", "status", "found"),
    [
        (GPUS, 0, {"device 0": "ok", "device 1": "ok", "NVIDIA driver": "ok"}),
        ("No devices were found\n", 0, {"devices": "warn"}),
        ("No devices were found\n", 6, {"devices": "fail"}),
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18, {"devices": "fail"}),
        (
            LOST + GPUS,
            15,
            {"device 0": "ok", "device 1": "ok", "devices": "warn", "NVIDIA driver": "ok"},
        ),
        ("2, [Unknown Error], , , \n", 0, {"devices": "warn"}),
        (
            GPUS + "2, [Unknown Error], , , \n",
            0,
            {"device 0": "ok", "device 1": "ok", "devices": "warn", "NVIDIA driver": "ok"},
        ),
    ],
)
def test_each_line_of_nvidia_smi_is_told(
    driver: Callable[..., None], words: str, status: int, found: dict[str, str]
) -> None:
    driver(words, status)
    told = {check.name: check for check in doctor._devices(settings.load())}
    assert {name: check.status for name, check in told.items()} == found
    odd = [line.strip() for line in words.splitlines() if line not in GPUS]
    assert all(line in told["devices"].seen for line in odd)


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        ("580.95.05", "13.0", "ok"),
        ("575.57.08", "13.0", "warn"),
        ("575.57.08", "12.8", "ok"),
        ("520.61.05", "12.8", "warn"),
        ("575.57.08", "", None),
        ("575.57.08", "11.8", None),
        ("[N/A]", "13.0", None),
    ],
)
def test_a_driver_too_old_for_torch_is_told(
    driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str,
    status: str | None,
) -> None:
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: cuda)
    driver(GPUS.replace("580.95.05", version))
    told = {check.name: check for check in doctor._devices(settings.load())}
    assert told["device 0"].status == "ok"
    check = told.get("NVIDIA driver")
    assert (check and check.status) == status
    assert status != "warn" or (check and version in check.seen)


def test_the_cuda_of_torch_is_read_without_loading_it() -> None:
    script = (
        "import sys\nfrom jobs import doctor\ncuda = doctor._cuda_of_torch()\n"
        "assert 'torch' not in sys.modules\nimport torch\nassert cuda == (torch.version.cuda or '')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_preset_is_not_judged_where_the_gpus_are_unknown(driver: Callable[..., None]) -> None:
    """By the main memory of this machine it would fit."""
    shipped.copy("tiny", settings.load().models_dir / "tiny")
    driver(LOST, 15)
    (check,) = doctor.fits(settings.load(), "tiny")
    assert (check.name, check.status) == ("fit tiny", "fail")
    assert LOST.strip() in check.seen


def test_a_check_that_meets_a_defect_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(_config: settings.Settings) -> Iterator[doctor.Check]:
        raise KeyError("odd")

    odd.__name__ = "_devices"
    monkeypatch.setattr(doctor, "_devices", odd)
    found = checks()
    assert (found["devices"].status, found["devices"].seen) == ("fail", "KeyError: 'odd'")
    assert "presets" in found


def test_settings_are_shown_with_their_source_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("secret").write_text("postgres://me:hidden@127.0.0.1:1/db")
    monkeypatch.setenv("DATABASE_URL_FILE", "secret")
    Path(".env").write_text("RUSHES_WINDOW=5\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    found = checks()
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
    found = checks()
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
    found = doctor._settings(settings.load())
    (shown,) = [check.seen for check in found if check.name == "setting CELERY_BROKER_URL"]
    assert shown.startswith(seen)


def test_a_default_preset_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_DEFAULT_IMAGE_PRESET", "tiny_i2w")
    found = checks()["default preset"]
    assert (found.status, "did you mean 'tiny_i2v'" in found.seen) == ("fail", True)
    assert "RUSHES_DEFAULT_IMAGE_PRESET" in found.seen


def test_proxies_that_are_none_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be meant for another program of this machine."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "unix:")
    found = checks()["proxies"]
    assert (found.status, "'unix:' does not appear" in found.seen) == ("warn", True)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1,")
    assert "proxies" not in checks()


def test_settings_of_rendering_are_shown_where_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("RUSHES_X264_PRESET=slow\n")
    monkeypatch.setenv("RUSHES_DTYPE", "float32")
    found = checks()
    assert found["setting RUSHES_X264_PRESET"].seen == "slow (.env)"
    assert found["setting RUSHES_DTYPE"].seen == "float32 (environment RUSHES_DTYPE)"
    assert "setting RUSHES_ENCODER" not in found
    monkeypatch.setenv("RUSHES_C2PA_TIMESTAMP_URL", "https://me:hidden@tsa.example/ts")
    assert checks()["setting RUSHES_C2PA_TIMESTAMP_URL"].seen.startswith("https://***@tsa.example/")
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", "~/bad")
    shown = checks()["setting RUSHES_SIM_BAD_DEVICES"].seen
    assert shown.startswith(str(Path("~/bad").expanduser()))
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", "~nobody-of-this-name/bad")
    assert "RUSHES_SIM_BAD_DEVICES" in checks()["rendering settings"].seen
    monkeypatch.delenv("RUSHES_SIM_BAD_DEVICES")
    monkeypatch.setenv("RUSHES_C2PA_CERTIFICATE", "nowhere.pem")
    assert "RUSHES_C2PA_KEY belong together" in checks()["rendering settings"].seen
    monkeypatch.setenv("RUSHES_DTYPE", "foo")
    check = checks()["rendering settings"]
    assert check.status == "fail"
    assert "RUSHES_DTYPE" in check.seen


def test_a_setting_that_rushes_up_left_empty_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = {"RUSHES_RESULTS_URL": "s3://b", "AWS_SESSION_TOKEN": "", "AWS_ACCESS_KEY_ID": "me"}
    monkeypatch.setattr(settings, "read_up_file", lambda _home: store)
    config = settings.load()
    shown = {check.name for check in doctor._settings(config)}
    assert "setting AWS_ACCESS_KEY_ID" in shown
    assert "setting AWS_SESSION_TOKEN" not in shown


def test_each_value_of_the_store_has_the_place_that_it_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def places() -> set[str]:
        checks = doctor._settings(settings.load())
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


def test_a_bucket_that_keeps_versions_is_told_and_one_that_does_not_say_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> bool:
        raise storage.StorageDenied("s3://b", "403 AccessDenied")

    assert "results versions" not in checks()
    monkeypatch.setattr(folder_store.FolderStore, "keeps_versions", refuse)
    found = checks()
    assert "results versions" not in found
    assert found["results store"].status == "ok"
    monkeypatch.setattr(folder_store.FolderStore, "keeps_versions", lambda _: True)
    check = checks()["results versions"]
    assert (check.status, check.advice) == ("warn", "add a lifecycle rule for noncurrent versions")


def test_a_folder_of_presets_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "elsewhere")
    assert checks()["presets"].status == "fail"


def test_a_wrong_setting_is_the_only_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_WINDOW", "0")
    found = checks()
    assert [check.status for check in found.values()] == ["fail"]


def test_the_command_fails_when_a_check_does() -> None:
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1
    assert "failures" in result.stdout
    told = json.loads(CliRunner().invoke(cli.main, ["doctor", "-o", "json"]).stdout)
    assert {"name", "status", "seen", "advice"} == set(told["checks"][0])


@pytest.mark.timeout(120)
def test_real_servers_pass(
    clean_redis_url: str, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", clean_redis_url)
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    migrated()
    found = checks()
    for name in ("redis", "redis eviction", "redis persistence", "results store", "results links"):
        assert found[name].status == "ok", found[name]
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    links = checks()["results links"]
    assert links.status == "warn", links
    assert "until the temporary credentials end" in links.seen


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
    found = checks()
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
    found = checks()["results store"]
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
        untrusted = checks()["results store"]
        assert "CERTIFICATE_VERIFY_FAILED" in untrusted.seen
        assert untrusted.advice == doctor.NOT_TRUSTED
        Path(".env").write_text(f"AWS_CA_BUNDLE={tmp_path / 'cert'}\n")
        found = checks()
        assert found["results store"].status == "ok"
        assert found["results links"].status == "ok"
        monkeypatch.setattr(doctor, "_trust", lambda _config: None)
        links = checks()["results links"]
        assert links.status == "fail"
        assert "AWS_CA_BUNDLE" in links.advice
