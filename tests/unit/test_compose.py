"""The compose file and what belongs to it agree with the code, without starting anything."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from jobs import cli, settings
from worker import settings as worker_settings

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docker-compose.yml").read_text("utf-8")
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
WORKERS = {name: service for name, service in OURS.items() if name.startswith("worker-gpu")}
EXAMPLE = (REPOSITORY / ".env.example").read_text("utf-8")
INTERPOLATION = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")

SETTING_NAMES = {name for names in settings.environment_names().values() for name in names}
WORKER_NAMES = {
    str(name)
    for field in worker_settings.WorkerSettings.model_fields.values()
    for name in field.validation_alias.choices
}
SET_BY_THE_LAUNCHER = {"RUSHES_DEVICE", "RUSHES_WORKER_NAME"}
SET_BY_THE_IMAGE = {"RUSHES_HOME", "RUSHES_MODELS_DIR"}
NOT_IN_COMPOSE = {  # second names, paths and ports of the host, credentials of AWS, who submits
    "RUSHES_OWNER",
    "RUSHES_WEB_PORT",
    "REDIS_URL",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_SESSION_TOKEN",
    "S3_ADDRESSING_STYLE",
    "RUSHES_PRESETS_DIR",
    "RUSHES_SCRATCH_DIR",
    # Files of yours: they come with a volume, in a compose file of your own.
    "AWS_CA_BUNDLE",
    "RUSHES_C2PA_CERTIFICATE",
    "RUSHES_C2PA_KEY",
    "RUSHES_C2PA_ALGORITHM",
    "RUSHES_C2PA_TIMESTAMP_URL",
}


def _example_values():
    pairs = re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE)
    return dict(pairs)


def _seconds(duration):
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def _filled_in(text):
    """As compose does with no variable set."""
    return INTERPOLATION.sub(lambda match: match[3] if match[2] == "-" else "", text)


@pytest.mark.skipif(
    not shutil.which("docker")
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="no docker compose here: the file is checked as YAML only",
)
def test_docker_compose_accepts_the_file(tmp_path):
    filled = re.sub(r"^(\w*(?:PASSWORD|KEY\w*))=$", r"\1=abc123abc123", EXAMPLE, flags=re.MULTILINE)
    env_file = tmp_path / "env"
    env_file.write_text(filled)
    result = subprocess.run(
        ["docker", "compose", "--env-file", str(env_file), "config", "--quiet"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr.strip(), result.stderr


def test_the_parts_are_there():
    assert set(SERVICES) == {
        "postgres",
        "redis",
        "seaweedfs",
        "migrate",
        "dispatcher",
        "notifier",
        "worker-gpu0",
        "web",
    }


@pytest.mark.parametrize("name", OURS)
def test_each_command_of_our_services_exists(name):
    for arguments in _command_lines(OURS[name]):
        command = cli.main.get_command(click.Context(cli.main), arguments[0])
        assert command is not None, f"no `rushes {arguments[0]}`"
        if isinstance(command, click.Group):
            command = command.commands[arguments.pop(1)]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert set(arguments[1:]) <= flags


def _command_lines(service):
    yield list(service["command"])
    if "healthcheck" in service:
        kind, program, *arguments = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "rushes")
        yield arguments


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_given_known_variables_only(name):
    assert set(OURS[name]["environment"]) <= SETTING_NAMES | WORKER_NAMES


def test_each_setting_reaches_the_workers():
    missing = (SETTING_NAMES | WORKER_NAMES) - set(SERVICES["worker-gpu0"]["environment"])
    of_web = missing & set(SERVICES["web"]["environment"])
    prefixes = ("RUSHES_WEB_", "RUSHES_DEFAULT_", "FORWARDED_")
    assert {name for name in of_web if not name.startswith(prefixes)} == set()
    assert missing - of_web == SET_BY_THE_LAUNCHER | SET_BY_THE_IMAGE | NOT_IN_COMPOSE


def test_the_image_sets_what_compose_leaves_to_it():
    dockerfile = (REPOSITORY / "Dockerfile").read_text("utf-8")
    values = dict(re.findall(r"\b(RUSHES_\w+)=(\S+)", dockerfile))
    assert values == {"RUSHES_HOME": "/var/lib/rushes", "RUSHES_MODELS_DIR": "/models"}


@pytest.mark.parametrize("name", OURS)
def test_the_settings_load_from_the_defaults_of_the_compose_file(name, monkeypatch):
    for variable, value in OURS[name]["environment"].items():
        monkeypatch.setenv(variable, _filled_in(str(value)))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    loaded = settings.load()
    assert loaded.database_url.get_secret_value().startswith(
        "postgresql+psycopg://rushes:@postgres"
    )
    assert loaded.grace_seconds == 300
    assert loaded.lease_seconds == settings.Settings.model_fields["lease_seconds"].default
    worker_settings.load()


def test_passwords_have_no_defaults():
    for name, mark, _ in INTERPOLATION.findall(TEXT):
        if "PASSWORD" in name or "ACCESS_KEY" in name:
            assert mark == "?", f"{name} must be required"
            assert _example_values()[name] == ""


def test_each_dependency_exists_and_can_be_met():
    for service in SERVICES.values():
        for name, wish in service.get("depends_on", {}).items():
            if wish["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]
            else:
                assert wish["condition"] == "service_completed_successfully"
                assert SERVICES[name]["restart"] == "no"


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_has_a_healthcheck_or_ends(name):
    service = SERVICES[name]
    if service["restart"] == "no":
        return
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert _seconds(service["healthcheck"]["timeout"]) <= _seconds(
        service["healthcheck"]["interval"]
    )


def test_volumes_are_declared_and_used():
    used = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(("$", ".", "/"))
    }
    assert used == set(COMPOSE["volumes"])


def test_ports_are_published_on_this_machine_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 4
    for port in published:
        host, _, container = _filled_in(port).rpartition(":")
        assert re.fullmatch(r"127\.0\.0\.1:\d+", host)
        assert host.endswith(container)


def test_services_are_addressed_at_the_ports_that_they_listen_on():
    environment = SERVICES["worker-gpu0"]["environment"]
    for name in ("DATABASE_URL", "CELERY_BROKER_URL", "AWS_ENDPOINT_URL_S3"):
        host, port = re.search(r"(?:@|//)([a-z]+):(\d+)", environment[name]).groups()
        assert SERVICES[host]["ports"][0].endswith(f":{port}")


def test_redis_keeps_everything():
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_bucket_that_is_made_is_the_bucket_that_is_used():
    bucket = SERVICES["worker-gpu0"]["environment"]["RUSHES_RESULTS_URL"].removeprefix("s3://")
    assert f"-bucket={bucket}" in SERVICES["seaweedfs"]["command"]


def test_each_worker_has_one_gpu_of_its_own():
    seen = []
    for service in _workers_with_the_commented_one().values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        assert "count" not in device  # compose refuses it beside device_ids
        seen += device["device_ids"]
    assert seen == ["0", "1"]


def test_workers_differ_in_name_and_volume_only_where_they_must():
    first, second = _workers_with_the_commented_one().values()
    assert first["environment"]["RUSHES_HOST"] != second["environment"]["RUSHES_HOST"]
    assert first["volumes"][1] != second["volumes"][1]
    for service in (first, second):
        assert service["volumes"][0].endswith(":/models:ro")
        assert service["volumes"][1].endswith(":/var/lib/rushes")
        for key in ("deploy", "volumes", "environment"):
            service.pop(key)
    assert first == second


def _workers_with_the_commented_one():
    """As the file reads when someone follows its advice."""
    uncommented = re.sub(r"^  # (worker-gpu1:|  .*)$", r"  \1", TEXT, flags=re.MULTILINE)
    services = yaml.safe_load(uncommented)["services"]
    return {name: services[name] for name in ("worker-gpu0", "worker-gpu1")}


def test_a_worker_has_longer_to_stop_than_its_grace_time():
    for service in WORKERS.values():
        grace = _filled_in(str(service["environment"]["RUSHES_GRACE_SECONDS"]))
        assert float(grace) == settings.Settings.model_fields["grace_seconds"].default
        assert _seconds(_filled_in(service["stop_grace_period"])) >= float(grace) + 30


def test_workers_have_an_init_process_and_shared_memory():
    for service in WORKERS.values():
        assert service["init"] is True
        assert service["shm_size"]


def test_no_image_floats():
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    base = re.search(r"^FROM (\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)[1]
    for image in [*images, base]:
        assert re.search(r":\d+\.\d+", image), f"{image}: name a version"


def test_the_image_does_not_run_as_root():
    dockerfile = (REPOSITORY / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^USER (\w+)$", dockerfile, re.MULTILINE)[-1] == "rushes"
    assert 'ENTRYPOINT ["rushes"]' in dockerfile


def test_the_image_has_what_kernels_and_the_encoder_of_a_gpu_need():
    dockerfile = (REPOSITORY / "Dockerfile").read_text("utf-8")
    installed = re.search(r"apt-get install .*--no-install-recommends (.+) \\$", dockerfile, re.M)[
        1
    ]
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    drivers = re.search(r"^ENV NVIDIA_DRIVER_CAPABILITIES=(\S+)$", dockerfile, re.MULTILINE)[1]
    assert set(drivers.split(",")) == {"compute", "utility", "video"}


def test_the_extras_of_the_image_are_there_and_pinned():
    dockerfile = (REPOSITORY / "Dockerfile").read_text("utf-8")
    asked = re.search(r'^ARG EXTRAS="(.+)"$', dockerfile, re.MULTILINE)[1].split()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [need for extra in asked for need in project["optional-dependencies"][extra]]
    pinned = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", need)[0] for need in needed} <= set(pinned)
    # As the image reads them.
    program = re.search(r'python -c "(import sys, tomllib.+?)" \$\{EXTRAS\}', dockerfile)[1]
    listed = subprocess.run(
        [sys.executable, "-c", program, *asked], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert listed.stdout.decode().splitlines() == project["dependencies"] + needed


def test_everything_that_the_image_needs_gets_past_the_ignore_file():
    allowed = set(re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert packages | {"pyproject.toml", "constraints.txt", "configs", "migrations"} <= allowed


def test_the_example_environment_names_every_variable():
    in_compose = {name for name, _, _ in INTERPOLATION.findall(TEXT)}
    missing = (SETTING_NAMES | WORKER_NAMES | in_compose) - set(_example_values())
    assert not missing


def test_the_example_environment_names_nothing_else():
    in_compose = {name for name, _, _ in INTERPOLATION.findall(TEXT)}
    assert set(_example_values()) <= SETTING_NAMES | WORKER_NAMES | in_compose


def test_the_example_environment_shows_the_defaults():
    """A value that is copied without thought changes nothing."""
    given = dict(re.findall(r"^([A-Z][A-Z0-9_]+)=(.+)$", EXAMPLE, re.MULTILINE))
    compose_defaults = {
        name: value for name, mark, value in INTERPOLATION.findall(TEXT) if mark == "-"
    }
    fields = {
        name: field.default
        for model in (settings.Settings, worker_settings.WorkerSettings)
        for field in model.model_fields.values()
        for name in field.validation_alias.choices
    }
    for name, value in given.items():
        default = compose_defaults.get(name) or fields[name]
        if isinstance(default, int | float):
            assert float(value) == default, name
        elif isinstance(fields.get(name), int | float):
            assert float(value) == float(default), name
        else:
            assert value == str(default), name


def test_the_example_environment_loads():
    shutil.copy(REPOSITORY / ".env.example", ".env")  # each test has its own current folder
    assert settings.load().models_dir == Path.cwd() / ".rushes" / "models"
    worker_settings.load()
