"""The unit for systemd is what systemd takes, and agrees with the code; nothing is started."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from jobs import cli, settings

FILE = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "rushes-worker.service"


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(FILE.read_text())
    return parser


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path):
    copy = tmp_path / FILE.name
    copy.write_text(FILE.read_text().replace("/opt/rushes/.venv/bin/rushes", sys.executable))
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
    )
    about_it = [line for line in told.stderr.splitlines() if FILE.stem in line]
    assert (told.returncode, about_it) == (0, [])


def test_its_command_exists(unit):
    program, *arguments = unit["Service"]["ExecStart"].split()
    assert Path(program).name == "rushes"
    assert cli.main.get_command(click.Context(cli.main), *arguments) is not None


def test_it_comes_back_after_a_reboot_and_after_any_number_of_failures(unit):
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Service"]["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert "network-online.target" in unit["Unit"]["Wants"]


def test_it_has_time_to_drain_and_one_killed_child_ends_no_other(unit):
    grace = settings.Settings.model_fields["grace_seconds"].default
    assert float(unit["Service"]["TimeoutStopSec"]) >= grace + 60
    assert unit["Service"]["KillMode"] == "mixed"
    assert unit["Service"]["OOMPolicy"] == "continue"


def test_it_is_not_root_and_its_folder_outlives_a_restart(unit):
    service = unit["Service"]
    assert service["User"] not in ("", "root")
    assert service["WorkingDirectory"] == f"/var/lib/{service['StateDirectory']}"
    # Where commands in that folder find their settings.
    assert service["EnvironmentFile"] == f"{service['WorkingDirectory']}/.env"
