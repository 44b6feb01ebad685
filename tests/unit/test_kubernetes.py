"""The manifests are what Kubernetes takes, and agree with the code; nothing is started."""

import warnings
from pathlib import Path

import click
import pytest
import yaml
from sqlalchemy import text

from jobs import cli, database, migrate, settings
from worker import settings as worker_settings

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
VERSION = "1.37"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
DOCUMENTS = [
    document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / name).read_text())
]
BY_NAME = {(each["kind"], each["metadata"]["name"]): each for each in DOCUMENTS}
OF_KEDA = [each for each in DOCUMENTS if each["apiVersion"].startswith("keda.sh/")]
PODS = {
    name: each["spec"]["template"]["spec"]
    for (_, name), each in BY_NAME.items()
    if "template" in each.get("spec", {})
}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}


def test_kubernetes_takes_every_manifest():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the validator's own dependencies
        import kubernetes_validate

        for document in DOCUMENTS:
            if document not in OF_KEDA:
                kubernetes_validate.validate(document, VERSION, strict=True)


def test_every_file_is_named():
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


def test_the_parts_are_there():
    assert set(PODS) == {"migrate", "dispatcher", "notifier", "web", "worker"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_command_and_check_exists(name):
    container = CONTAINERS[name]
    probes = [
        container[probe] for probe in ("livenessProbe", "readinessProbe") if probe in container
    ]
    checks = [probe["exec"]["command"][1:] for probe in probes if "exec" in probe]
    for arguments in [container["args"], *checks]:
        command = cli.main.get_command(click.Context(cli.main), arguments[0])
        assert command is not None
        rest = arguments[1:]
        if isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        assert set(rest) <= {flag for parameter in command.params for flag in parameter.opts}


def test_each_variable_is_a_setting():
    known = {name for names in settings.environment_names().values() for name in names}
    known |= {
        name
        for field in worker_settings.WorkerSettings.model_fields.values()
        for name in field.validation_alias.choices
    }
    given = set(BY_NAME["ConfigMap", "rushes"]["data"])
    given |= {entry["name"] for each in CONTAINERS.values() for entry in each.get("env", ())}
    assert given <= known


def test_a_worker_has_one_gpu_a_name_of_its_own_and_time_to_drain():
    assert CONTAINERS["worker"]["resources"]["limits"]["nvidia.com/gpu"] == 1
    (host,) = (entry for entry in CONTAINERS["worker"]["env"] if entry["name"] == "RUSHES_HOST")
    assert host["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    grace = float(BY_NAME["ConfigMap", "rushes"]["data"]["RUSHES_GRACE_SECONDS"])
    assert PODS["worker"]["terminationGracePeriodSeconds"] >= grace + 60
    assert "kill -TERM 1" in CONTAINERS["worker"]["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_nothing_runs_as_root_or_with_rights_that_it_does_not_need():
    for pod in PODS.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_the_scaler_names_what_is_there():
    scaled = BY_NAME["ScaledObject", "worker"]["spec"]
    target = scaled["scaleTargetRef"]
    assert BY_NAME[target["kind"], target["name"]]["apiVersion"] == target["apiVersion"]
    (trigger,) = scaled["triggers"]
    assert trigger["type"] == "postgresql"
    wanted = BY_NAME["TriggerAuthentication", trigger["authenticationRef"]["name"]]
    assert wanted["spec"]["secretTargetRef"][0]["key"] == "DATABASE_URL"


def test_how_many_there_are_of_what_is_scaled_is_said_by_its_scaler_alone():
    """Else each `kubectl apply` sets it back."""
    targets = [
        each["spec"]["scaleTargetRef"] for each in OF_KEDA if "scaleTargetRef" in each["spec"]
    ]
    assert targets
    for target in targets:
        assert "replicas" not in BY_NAME[target["kind"], target["name"]]["spec"]


def test_services_set_no_variables():
    """The kubelet's RUSHES_WEB_PORT of a Service called rushes-web is no port."""
    assert all(pod["enableServiceLinks"] is False for pod in PODS.values())


def test_the_scaler_counts_what_waits_and_what_runs(postgres_database_url):
    """Its query runs on our tables; paused batches wake no worker, running jobs keep theirs."""
    db = database.Database(postgres_database_url)
    migrate.upgrade(db)
    insert = text(
        "INSERT INTO batches (id, owner, preset, priority, boost, fingerprint, created_at, total,"
        " queued, running, succeeded, failed, cancelled, paused_at, finished_at) VALUES"
        " (:id, '', 'p', 0, 0, 'f', now(), 9, :queued, :running, 0, 0, 0, :paused, :finished)"
    )
    row = {"queued": 0, "running": 0, "paused": None, "finished": None}
    (trigger,) = BY_NAME["ScaledObject", "worker"]["spec"]["triggers"]
    with db.engine.begin() as connection:
        count = text(trigger["metadata"]["query"])
        assert connection.scalar(count) == 0
        connection.execute(insert, row | {"id": "a", "queued": 5, "running": 2})
        connection.execute(insert, row | {"id": "b", "queued": 7, "running": 1, "paused": "now"})
        connection.execute(insert, row | {"id": "c", "finished": "now"})
        assert connection.scalar(count) == 5 + 2 + 1
    db.close()
