"""What a video says of itself, as readers that know nothing of us find it."""

import re
import subprocess
from xml.etree import ElementTree

import imageio_ffmpeg
import pytest

from jobs import lifecycle
from worker import scratch, simulation

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"


def tags(path):
    """By ffmpeg, from the file's tags and its XMP."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-export_xmp", "1", "-i", str(path)]
    told = subprocess.run([*command, "-f", "ffmetadata", "-"], capture_output=True, check=True)
    text = re.sub(r"\\(.)", r"\1", told.stdout.decode().replace("\\\n", " "))
    return dict(re.findall(r"^(comment|xmp)=(.*)$", text, re.MULTILINE))


def rendered(host, runner, **changes):
    job = host.submit(**changes)[0]
    runner.run_attempt(job.id)
    (folder,) = scratch.folders(host.config.scratch_dir)
    return job, folder


@pytest.fixture
def simulated(host, monkeypatch):
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "0")
    settings = type(host.worker_settings)()
    return host.runner(renderer=simulation.SimulatedRenderer(settings))


def test_a_video_says_that_a_trained_model_made_it_and_for_which_job(host):
    job, folder = rendered(host, host.runner())
    told = tags(folder.video)
    packet = ElementTree.fromstring(told["xmp"].encode())  # noqa: S314  # our own
    description = packet.find(f".//{RDF}Description")
    assert description.get(f"{IPTC}DigitalSourceType") == f"{VOCABULARY}trainedAlgorithmicMedia"
    assert description.get(f"{DUBLIN_CORE}identifier") == f"{job.batch_id}/{job.id}"
    assert f"{VOCABULARY}trainedAlgorithmicMedia" in told["comment"]
    assert f"job {job.batch_id}/{job.id}" in told["comment"]


def test_a_test_card_does_not_claim_to_come_from_a_trained_model(host, simulated):
    _, folder = rendered(host, simulated, model_path="simulated")
    assert f'DigitalSourceType="{VOCABULARY}algorithmicMedia"' in tags(folder.video)["xmp"]


def test_every_attempt_at_a_job_makes_the_same_bytes(host):
    job, folder = rendered(host, host.runner())
    first = folder.video.read_bytes()
    host.db.write(lifecycle.release, folder.attempt_id, reason="again")
    folder.remove()
    host.runner().run_attempt(job.id)
    (again,) = scratch.folders(host.config.scratch_dir)
    assert again.attempt_id != folder.attempt_id
    assert again.video.read_bytes() == first
