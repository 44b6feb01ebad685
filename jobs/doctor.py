"""Checks each real part of an installation: what was seen, and what to do about it."""

import contextlib
import hashlib
import importlib.util
import os
import re
import runpy
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import redis
from pydantic import SecretStr
from sqlalchemy import false, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from jobs import (
    beat,
    broker,
    database,
    direct,
    errors,
    migrate,
    misspelt,
    parts,
    presets,
    programs,
    queries,
    semaphores,
    settings,
    storage,
    store_mark,
    stores,
    workers,
)
from jobs.schema import Batch

MAX_CLOCK_SKEW_SECONDS = 5.0  # log lines and rows are compared by people
SLOW_BROKER_SECONDS = 0.1
MIN_SCRATCH_BYTES = 2_000_000_000  # a few hundred videos that wait for upload
PASSWORD_IN_URL = re.compile(r"://[^/\s]*@")
OBJECT_BYTES = 100_000
LINK_SECONDS = 60
PROGRAM_SECONDS = 20.0
LEAST_DRIVERS = {"12": 525, "13": 580}  # of NVIDIA, by CUDA's major version
KICK_SAMPLES = 10  # a dispatcher listens between its ticks, so one look may miss it


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part, how it was found, and what to do (empty: nothing)."""

    name: str
    status: Literal["ok", "warn", "fail"]
    seen: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """Every check, as soon as it is done. One that fails stops no other."""
    try:
        config = settings.load()
    except errors.RushesError as error:
        yield _fail("settings", str(error), "correct these values; docs/configuration.md")
        return
    examined: tuple[Callable[[settings.Settings], Iterator[Check]], ...] = (
        _settings,
        _rendering,
        _misspelt,
        _database,
        _broker,
        _results,
        _ffmpeg,
        _scratch,
        _shared_memory,
        _devices,
        _presets,
        _weights,
        _processes,
    )
    for part in examined:
        try:
            yield from part(config)
        except Exception as error:  # what this check did not expect: the others are worth having
            seen = f"{type(error).__name__}: {errors.first_line(error)}"
            advice = "look at this part yourself: its check met a defect in rushes"
            yield _fail(part.__name__.strip("_"), seen, advice)


def _ok(name: str, seen: str) -> Check:
    return Check(name=name, status="ok", seen=seen)


def _warn(name: str, seen: str, advice: str) -> Check:
    return Check(name=name, status="warn", seen=seen, advice=advice)


def _fail(name: str, seen: str, advice: str) -> Check:
    return Check(name=name, status="fail", seen=seen, advice=advice)


# Settings.


def _settings(config: settings.Settings) -> Iterator[Check]:
    for field, names in settings.environment_names().items():
        source = source_of(config, names)
        if getattr(config, field) in (None, "", SecretStr("")):
            continue
        if source != "default" or field in ("home", "database_url", "broker_url", "results_url"):
            yield _ok(f"setting {names[0]}", f"{_shown(config, field)} ({source})")
    for problem in settings.problems_of_proxies(config.forwarded_allow_ips):
        yield _warn("proxies", problem.message, "correct it for `rushes web`, which does not start")


def _rendering(_config: settings.Settings) -> Iterator[Check]:
    """How workers that are started here, as this command was, would render."""
    try:
        found = parts.RENDERING_SETTINGS.load()()
    except errors.RushesError as error:
        yield _fail("rendering settings", str(error), "correct these values; docs/configuration.md")
        return
    for field in sorted(found.model_fields_set):
        name = str(type(found).model_fields[field].validation_alias.choices[0])
        source = f"environment {name}" if name in settings.exported_names() else ".env"
        shown = PASSWORD_IN_URL.sub("://***@", str(getattr(found, field)))
        yield _ok(f"setting {name}", f"{shown} ({source})")


def _misspelt(_config: settings.Settings) -> Iterator[Check]:
    for each in misspelt.find():
        meant = f"did you mean {each.nearest}?" if each.nearest else "remove it;"
        advice = f"{meant} docs/configuration.md names every setting"
        yield _warn(f"setting {each.name}", f"there is no such setting ({each.place})", advice)


def source_of(config: settings.Settings, names: tuple[str, ...]) -> str:
    """Which of the places that `jobs.settings` reads gives this value."""
    up = settings.read_up_file(config.home)
    from_up = next((name for name in names if name in up), None)
    of_store = from_up in settings.RESULTS_NAMES
    if of_store and settings.is_store_of_up(up, config.results_url):
        return f"running `rushes up`, {from_up}"
    exported = settings.exported_names()
    for name in names:
        if name in exported:
            return f"environment {name}"
    for name in names:
        if os.environ.get(f"{name}_FILE"):
            return f"file named by {name}_FILE"
    if not settings.given_names().isdisjoint(names):
        return ".env"
    is_given = of_store and "RUSHES_RESULTS_URL" in settings.given_names()
    if from_up is not None and not is_given:
        return f"running `rushes up`, {from_up}"
    return "default"


def _shown(config: settings.Settings, field: str) -> str:
    if field == "database_url":
        with contextlib.suppress(errors.RushesError):
            return database.shown(database.connect(config).url)
    if field == "broker_url":
        return broker.shown(config.broker_url.get_secret_value())
    if field in ("aws_secret_access_key", "aws_session_token"):
        return "(secret)"
    return str(getattr(config, field))


# Database.


def _database(config: settings.Settings) -> Iterator[Check]:
    db = database.connect(config)
    try:
        if missing := db.missing_file:
            advice = "`rushes up` or `rushes migrate` makes it"
            yield _fail("database", f"{missing} does not exist", advice)
            return
        with contextlib.closing(db):
            began = time.monotonic()
            with db.reading() as session:
                skew = abs((database.now(session) - datetime.now(UTC)).total_seconds())
                through = ", through a pooler" if database.is_pooled(session) else ""
            milliseconds = (time.monotonic() - began) * 1000
            revision, head = migrate.current(db), migrate.head()
            refused = None if revision is None else _refused_write(db)
    except (SQLAlchemyError, errors.RushesError) as error:
        advice = "start the server or correct DATABASE_URL"
        yield _fail("database", errors.first_line(error), advice)
        return
    seen = f"{db.url.get_backend_name()} answers in {milliseconds:.0f} ms{through}"
    yield _ok("database", seen)
    if refused is not None:
        advice = "lead DATABASE_URL to the primary, or give its disk room"
        yield _fail("database writes", refused, advice)
    if revision == head:
        yield _ok("database tables", f"revision {revision}")
    elif migrate.is_newer(revision):
        seen = f"at revision {revision} of a newer version, this one made {head}"
        advice = "none needed: older versions work on them; upgrade when you can"
        yield _warn("database tables", seen, advice)
    else:
        seen = f"at revision {revision or 'none'}, this version needs {head}"
        yield _fail("database tables", seen, "run `rushes migrate`")
    if skew > MAX_CLOCK_SKEW_SECONDS:
        seen = f"this machine and the database differ by {skew:.0f} s"
        yield _warn("clock", seen, "run NTP on both; leases use the database's clock only")


def _refused_write(db: database.Database) -> str | None:
    """Of a change of no row: what a standby or a disk that is read-only says to it."""
    if db.lacks_room():
        return f"less than {database.LEAST_FREE_BYTES >> 20} MB are free for {db.url.database}"
    try:
        with db.transaction() as session:
            session.execute(update(Batch).where(false()).values(name=None))
    except DBAPIError as error:
        return errors.first_line(error)
    return None


# Redis.


def _broker(config: settings.Settings) -> Iterator[Check]:
    try:
        connection = broker.Broker(config)
        client = connection.redis
        client.echo("")  # connects; unlike a ping it is answered by one whose disk is full
        began = time.monotonic()
        client.echo("")
        seconds = time.monotonic() - began
        info = _info(client)
        unfit = _unfit(connection, info)
    except (*broker.UNAVAILABLE, errors.RushesError, ValueError) as error:
        seen = errors.first_line(error)
        advice = f"{_advice_on_redis(seen)}; submitted jobs are safe meanwhile"
        yield _fail("redis", seen, advice)
        return
    version = info.get("valkey_version") or info.get("redis_version", "unknown")
    seen = f"version {version} answers in {seconds * 1000:.1f} ms"
    if unfit:
        yield unfit
    elif seconds > SLOW_BROKER_SECONDS:
        yield _warn("redis", seen, "it is slow or far away; put it near the dispatcher")
    else:
        yield _ok("redis", seen)
    if not info:
        seen = "this user may not ask (INFO): cannot tell eviction and persistence"
        advice = _rights(connection)
        if unfit is None or unfit.advice != advice:
            yield _warn("redis settings", seen, advice)
        return
    yield _eviction(client, info)
    yield _persistence(client, info)


def _advice_on_redis(problem: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in problem:  # in the words of OpenSSL, as the next
        return "ssl_ca_certs must name the file of its authority; or correct the certificate"
    if "CERTIFICATE_REQUIRED" in problem or "EOF occurred" in problem:
        return "it may want a certificate from us: ssl_certfile and ssl_keyfile; or start Redis"
    return "start Redis or correct CELERY_BROKER_URL"


def _info(client: redis.Redis) -> dict[str, Any]:
    """Empty where this user may not ask."""
    try:
        return _answer(client.info())
    except redis.exceptions.NoPermissionError:
        return {}


def _unfit(connection: broker.Broker, info: dict[str, Any]) -> Check | None:
    """It answers, but nothing would be rendered."""
    if info.get("cluster_enabled"):
        advice = "name one Redis or Valkey in CELERY_BROKER_URL, with or without replicas"
        return _fail("redis", "it is a Cluster, with which Celery cannot work", advice)
    if info.get("role") == "slave":
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        advice = "name the primary in CELERY_BROKER_URL, by a name that follows it"
        return _fail("redis", f"it is a replica of {primary}", advice)
    if refusal := connection.refusal():
        advice = "docs/operations.md, Redis takes nothing; submitted jobs are safe meanwhile"
        return _fail("redis", f"it answers, but takes no writes: {refusal}", advice)
    if withheld := connection.withheld():
        seen = f"this user may not use what Celery needs: {', '.join(withheld)}"
        return _fail("redis", seen, _rights(connection))
    return None


def _rights(connection: broker.Broker) -> str:
    return f"ACL SETUSER NAME {connection.rights}"


def _answer(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


def _eviction(client: redis.Redis, info: dict[str, Any]) -> Check:
    policy = info.get("maxmemory_policy") or _configured(client, "maxmemory-policy")
    if policy == "noeviction":
        return _ok("redis eviction", "maxmemory-policy noeviction")
    seen = f"maxmemory-policy is {policy or 'unknown'}: messages may vanish when memory is full"
    return _warn("redis eviction", seen, "set maxmemory-policy noeviction")


def _configured(client: redis.Redis, name: str) -> str | None:
    """None where a managed Redis does not tell its configuration."""
    try:
        return str(_answer(client.config_get(name)).get(name, ""))
    except redis.RedisError:
        return None


def _persistence(client: redis.Redis, info: dict[str, Any]) -> Check:
    if info.get("aof_enabled"):
        return _ok("redis persistence", "append-only file")
    saves = _configured(client, "save")
    if saves:
        return _ok("redis persistence", "snapshots")
    seen = "neither append-only file nor snapshots: a restart empties the queues"
    if saves is None:
        seen = "no append-only file, snapshots unknown: a restart may empty the queues"
    advice = "appendonly yes; without it nothing is lost, the dispatcher sends the messages again"
    return _warn("redis persistence", seen, advice)


# Results.


def _results(config: settings.Settings) -> Iterator[Check]:
    try:
        store = stores.open_store(config)
        yield from _round_trip(store, config)
    except storage.StorageDenied as error:
        advice = "correct keys, rights or RUSHES_RESULTS_URL"
        if "RequestTimeTooSkewed" in str(error):
            advice = "run NTP on this machine: the store takes nothing from a wrong clock"
        yield _fail("results store", str(error), advice)
    except errors.InvalidInput as error:
        yield _fail("results store", str(error), "correct these values; docs/configuration.md")
    except errors.RushesError as error:
        yield _fail("results store", str(error), _advice_on(str(error)))


def _advice_on(problem: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in problem:
        return NOT_TRUSTED
    if "WRONG_VERSION_NUMBER" in problem:  # in the words of OpenSSL
        return "nothing speaks TLS there: correct AWS_ENDPOINT_URL_S3, perhaps to http://"
    return "start the store or correct RUSHES_RESULTS_URL"


def _round_trip(store: storage.ObjectStore, config: settings.Settings) -> Iterator[Check]:
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
            yield _fail("results store", seen, "do not use this store: it changes objects")
        else:
            seen = f"{store.url}: put, head and get of 100 kB in {seconds:.2f} s, sha256 right"
            yield _ok("results store", seen)
        if head is not None and head.sha256 is None:
            advice = (
                "none needed: sizes are compared, and videos carry their sha256 in the database"
            )
            yield _warn("results checksums", "the store keeps no sha256 metadata", advice)
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
            yield _warn("results delete", f"{key} is still there", "allow s3:DeleteObject")


def _farm(config: settings.Settings, store: storage.ObjectStore) -> Iterator[Check]:
    """Whether it is the one that the other processes use."""
    try:
        db = database.connect(config)
        if db.missing_file is None:
            with contextlib.closing(db):
                store_mark.Guard(db, store).require()
    except store_mark.OtherStore as error:
        yield _fail("results store of the farm", str(error), OTHER_STORE)
    except (SQLAlchemyError, errors.RushesError):
        pass  # the checks of these two say it


OTHER_STORE = (
    "correct RUSHES_RESULTS_URL or AWS_ENDPOINT_URL_S3; if the farm moves to this store, "
    "`rushes migrate --store`"
)


def _listing(store: storage.ObjectStore, key: str) -> Check:
    advice = "allow s3:ListBucket (on the bucket)"
    try:
        if key in store.list("doctor/"):
            return _ok("results listing", "a new object shows up")
    except storage.StorageDenied as error:
        return _fail("results listing", str(error), advice)
    return _warn("results listing", "a new object does not show up", advice)


def _versions(store: storage.ObjectStore) -> Iterator[Check]:
    with contextlib.suppress(errors.RushesError):  # a right that few have, and few stores know it
        if store.keeps_versions():
            seen = "the bucket keeps versions: what `rushes gc` deletes stays, and is paid for"
            yield _warn("results versions", seen, "add a lifecycle rule for noncurrent versions")


def _link(store: storage.ObjectStore, key: str, sha256: str, config: settings.Settings) -> Check:
    link = store.presign(key, seconds=LINK_SECONDS)
    parts = urlsplit(link)
    where = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in ("http", "https"):
        return _ok("results links", "files of this machine: no links needed")
    advice = "S3_PUBLIC_ENDPOINT_URL must be the store's address as readers reach it"
    if config.s3_endpoint_url is None:
        advice = "set AWS_REGION to the region of the bucket: links are signed for it"
    try:
        with direct.opened(link, seconds=10, tls=_trust(config)) as answer:
            content = answer.read(OBJECT_BYTES + 1)
    except urllib.error.HTTPError as error:
        return _fail("results links", f"{where} answers {error.code}", advice)
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            advice = NOT_TRUSTED
        return _fail("results links", f"{where}: {error}", advice)
    if hashlib.sha256(content).hexdigest() != sha256:
        return _fail("results links", f"{where} gives other bytes", advice)
    if "X-Amz-Security-Token" in parts.query:
        seen = f"a presigned link works: {where}, until the temporary credentials end, within hours"
        return _warn("results links", seen, "for links that live longer, give lasting keys")
    return _ok("results links", f"a presigned link works: {where}")


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


# This machine.


def _ffmpeg(_config: settings.Settings) -> Iterator[Check]:
    advice = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
        version = _said([program, "-version"]).splitlines()[0]
        encoders = _said([program, "-hide_banner", "-encoders"])
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError, IndexError) as error:
        yield _fail("ffmpeg", errors.first_line(error), advice)
        return
    short = " ".join(version.split()[:3])
    if "libx264" not in encoders:
        yield _fail("ffmpeg", f"{program} has no libx264", advice)
    else:
        yield _ok("ffmpeg", f"{short} with libx264: {program}")


def _said(command: list[str]) -> str:
    done = programs.run(command, seconds=PROGRAM_SECONDS)
    done.check_returncode()
    return done.stdout


def _scratch(config: settings.Settings) -> Iterator[Check]:
    folder = config.scratch_dir
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    advice = "set RUSHES_SCRATCH_DIR to a folder on a disk with room"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield _fail("scratch", f"{nearest} cannot be written", advice)
        return
    free = shutil.disk_usage(nearest).free
    seen = f"{folder}: {free / 1e9:.1f} GB free"
    if free < workers.MIN_FREE_BYTES:
        yield _fail("scratch", f"{seen}: its workers take no jobs", advice)
    elif free < MIN_SCRATCH_BYTES:
        yield _warn("scratch", seen, advice)
    else:
        yield _ok("scratch", seen)


def _shared_memory(_config: settings.Settings) -> Iterator[Check]:
    if refusal := semaphores.refusal():
        yield _fail("shared memory", f"{refusal}: no worker can start", semaphores.ADVICE)
    else:
        yield _ok("shared memory", "has room for semaphores")


def _devices(_config: settings.Settings) -> Iterator[Check]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield _warn("devices", "no NVIDIA driver here: workers would render on the CPU", NO_GPU)
        return
    columns = "index,name,memory.total,memory.free,driver_version"
    try:
        command = [program, f"--query-gpu={columns}", "--format=csv,noheader"]
        done = programs.run(command, seconds=PROGRAM_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        yield _fail("devices", f"nvidia-smi: {errors.first_line(error)}", NO_DRIVER)
        return
    driver, odd = None, []
    for row in filter(str.strip, (*done.stdout.splitlines(), *done.stderr.splitlines())):
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == 5 and cells[0].isdecimal() and all(cells):
            index, name, total, free, driver = cells
            yield _ok(f"device {index}", f"{name}, {total}, {free} free")
        else:
            odd.append(row.strip())
    said = "; ".join(odd)[:300]
    seen = f"nvidia-smi ends with status {done.returncode}" + (f": {said}" if said else "")
    if driver is not None:
        if done.returncode or odd:
            yield _warn("devices", seen, BAD_GPU)
        yield from _driver(driver)
    elif done.returncode:
        yield _fail("devices", seen, NO_DRIVER)
    else:
        seen = "the NVIDIA driver lists no GPU" + (f": {said}" if said else "")
        yield _warn("devices", seen, NO_GPU)


NO_GPU = "fine for the tiny model and for submitting; a 14B model needs a GPU"
BAD_GPU = "workers render on the GPUs that it lists; look at the others, and at `nvidia-smi -q`"
NO_DRIVER = "repair the NVIDIA driver; where there is no GPU, start workers with --devices cpu"


def _driver(version: str) -> Iterator[Check]:
    """Whether torch can use it; says nothing where one of the two does not tell its version."""
    cuda = _cuda_of_torch()
    least = LEAST_DRIVERS.get(cuda.split(".")[0])
    major = version.split(".")[0]
    if least is None or not major.isdecimal():
        return
    seen = f"{version}; torch's CUDA {cuda} needs {least} or newer"
    if int(major) >= least:
        yield _ok("NVIDIA driver", seen)
    else:
        advice = "workers may see no GPU: install a newer driver, or a torch with an older CUDA"
        yield _warn("NVIDIA driver", seen, advice)


def _cuda_of_torch() -> str:
    """Empty where it has none; read from its file, since to load it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return ""
    return str(runpy.run_path(str(Path(found.origin).with_name("version.py"))).get("cuda") or "")


# Presets and weights.


def _presets(config: settings.Settings) -> Iterator[Check]:
    try:
        presets.check_folder(config.presets_dir)
    except errors.FileUnusable as error:
        yield _fail("presets", str(error), "make the folder, correct the setting or remove it")
        return
    found = presets.available(config.presets_dir)
    broken = [entry for entry in found if isinstance(entry, presets.BrokenPreset)]
    for entry in broken:
        yield _warn(f"preset {entry.name}", entry.reason, "correct or remove the file")
    for problem in presets.problems_of(config.default_presets, folder=config.presets_dir):
        advice = "name a preset that is there: the web service does not start"
        yield _fail("default preset", problem.message, advice)
    if not broken:
        yield _ok("presets", ", ".join(preset.name for preset in found))


def _weights(config: settings.Settings) -> Iterator[Check]:
    """A warning, not a failure: the weights may be on other machines."""
    absent: dict[str, list[str]] = {}
    for preset in presets.available(config.presets_dir):
        if not isinstance(preset, presets.Preset):
            continue
        folder = config.models_dir / preset.look.model_path
        if os.path.isdir(folder):  # noqa: PTH112  # False where we may not look, too
            yield _weights_of(config, preset)
        else:
            absent.setdefault(preset.look.model_path, []).append(preset.name)
    if absent:
        wanted = "; ".join(f"{model} (for {len(names)} presets)" for model, names in absent.items())
        folder = config.models_dir
        where = f"not in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        advice = "put those there that this machine is to render; docs/weights.md"
        yield _warn("weights elsewhere", f"{where}: {wanted}", advice)


def _weights_of(config: settings.Settings, preset: presets.Preset) -> Check:
    name = f"weights {preset.name}"
    try:
        files = parts.FIND_WEIGHTS.load()(preset.look, config.models_dir)
        unlike = parts.UNLIKE_HEADERS.load()(preset.look, files, config.models_dir)
        passed_over = parts.KEYS_PASSED_OVER.load()(preset.look, files, config.models_dir)
    except ValueError as error:
        return _warn(name, str(error), "complete the folder: workers here cannot render these jobs")
    if unlike:
        return _warn(
            name, "; ".join(unlike), "it renders, though worse: mend the preset or the file"
        )
    total = sum(files.sizes_bytes.values())
    seen = f"{files.root}: {files.layout.value}, {len(files.weights)} files, {total:,} bytes"
    for path, count in passed_over.items():
        seen += f"; {count} keys of {path} are passed over: they are for Wan2.1's image encoder"
    return _ok(name, seen)


def fits(config: settings.Settings, preset_name: str) -> Iterator[Check]:
    """Whether each device here could render a preset: estimated from the checkpoint's sizes."""
    preset = presets.load(preset_name, folder=config.presets_dir)
    name = f"fit {preset.name}"
    try:
        found = parts.FIT.load()(preset.look, config.models_dir)
    except ValueError as error:
        yield _fail(name, str(error), "put the model there; docs/weights.md says which file where")
        return
    except errors.GpusUnknown as error:
        yield _fail(name, f"nvidia-smi: {error.said}", NO_DRIVER)
        return
    for fit in found:
        seen = (
            f"{fit.device}: needs about {fit.needs_bytes / 1e9:.1f} GB ({fit.worst_stage}; "
            f"{fit.mode}), has "
            + ("an unknown size" if fit.has_bytes is None else f"{fit.has_bytes / 1e9:.1f} GB")
        )
        advice = "take a preset with offload or 8-bit weights: docs/weights.md, memory modes"
        yield _ok(name, seen) if fit.is_enough else _fail(name, seen, advice)
    fit = found[0]
    if not fit.needs_host_bytes:
        return
    seen = (
        f"each of its workers keeps about {fit.needs_host_bytes / 1e9:.1f} GB in main memory"
        f"{fit.told_host}, {fit.has_host_bytes / 1e9:.1f} GB are free"
    )
    advice = "take a preset with less offload, 8-bit weights or no LoRA: docs/weights.md"
    fits_host = fit.needs_host_bytes <= fit.has_host_bytes
    yield (
        _ok(f"{name}, main memory", seen)
        if fits_host
        else _fail(f"{name}, main memory", seen, advice)
    )


# Processes.


def _processes(config: settings.Settings) -> Iterator[Check]:
    try:
        db = database.connect(config)
        if db.missing_file is None:
            with contextlib.closing(db), db.reading() as session:
                found = queries.live_workers(session)
            yield _workers(found)
    except (SQLAlchemyError, errors.RushesError):
        yield _warn("workers", "unknown: the database did not answer", "see above")
    yield _dispatcher(config)


def _workers(found: list[queries.LiveWorker]) -> Check:
    alive = [live.worker.name for live in found if live.is_alive]
    silent = [live.worker.name for live in found if not live.is_alive]
    advice = "start one with `rushes worker`, or everything with `rushes up`"
    if not alive:
        return _warn("workers", "none is alive", advice)
    refusing = [refusal for live in found if live.is_alive for refusal in live.refusals]
    if refusing:
        seen = "; ".join(f"{each.worker}: {each.reason}" for each in refusing)
        advice = "mend these hosts; they try again by themselves (`rushes workers` says when)"
        return _warn("workers", f"some take no jobs for now: {seen}", advice)
    if idle := [live.worker.name for live in found if live.has_no_models]:
        seen = f"no models on the hosts of {', '.join(idle)}, which take nothing"
        advice = "put models there or mend RUSHES_MODELS_DIR; docs/operations.md"
        return _warn("workers", seen, advice)
    if silent:
        seen = f"{', '.join(silent)} silent, alive: {', '.join(alive)}"
        return _warn("workers", seen, "look at their logs, or `rushes workers forget NAME`")
    return _ok("workers", f"alive: {', '.join(alive)}")


def _dispatcher(config: settings.Settings) -> Check:
    if beat.of_dispatcher(config).is_alive():
        return _ok("dispatcher", "alive on this machine")
    if _someone_listens(config):
        return _ok("dispatcher", "one listens on Redis")
    advice = "start one with `rushes dispatcher`, or everything with `rushes up`"
    return _warn("dispatcher", "none was seen, here or on Redis", advice)


def _someone_listens(config: settings.Settings) -> bool:
    """A dispatcher on any machine waits for kicks: the only one of us that uses BLPOP."""
    try:
        client = broker.Broker(config).redis
        for _ in range(KICK_SAMPLES):
            if any(entry.get("cmd") == "blpop" for entry in client.client_list()):
                return True
            time.sleep(0.1)
    except (*broker.UNAVAILABLE, errors.RushesError, ValueError):
        pass
    return False
