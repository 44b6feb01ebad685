"""Which processes a machine gets, told by an nvidia-smi of our own on PATH."""

import shlex

import pytest

from jobs import errors
from worker import gpus

H200 = "0, GPU-aaaa1111, NVIDIA H200, 143771\n1, GPU-bbbb2222, NVIDIA H200, 143771\n"
NAMES = "GPU 0: NVIDIA H200 (UUID: GPU-aaaa1111)\nGPU 1: NVIDIA H200 (UUID: GPU-bbbb2222)\n"
WITH_SLICES = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa1111)
  MIG 3g.71gb     Device  0: (UUID: MIG-cccc3333)
  MIG 1g.18gb     Device  1: (UUID: MIG-dddd4444)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb2222)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """`machine(csv)`: an nvidia-smi that answers so. Without a call there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(table, *, names="", status=0, before=""):
        program = folder / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\n{before}\n"
            f'if [ "$1" = -L ]; then printf %s {shlex.quote(names)}; '
            f"else printf %s {shlex.quote(table)}; fi\n"
            f"exit {status}\n"
        )
        program.chmod(0o755)

    return make


def names(slots):
    return [slot.short_name for slot in slots]


def test_auto_takes_every_gpu(machine):
    machine(H200)
    first, second = gpus.slots("auto", cores=4)
    assert (first.short_name, first.device) == ("gpu0", "NVIDIA H200")
    assert first.memory_bytes == 143771 << 20
    assert second.short_name == "gpu1"


def test_a_process_is_pinned_by_uuid_in_bus_order(machine):
    machine(H200)
    assert gpus.slots("1", cores=4)[0].environment == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-bbbb2222",
        "RUSHES_DEVICE": "cuda",
    }


def test_without_a_driver_auto_is_one_worker_on_all_cores():
    (slot,) = gpus.slots("auto", cores=6)
    assert slot.short_name == "cpu0"
    assert slot.environment == {
        "CUDA_VISIBLE_DEVICES": "",
        "RUSHES_DEVICE": "cpu",
        "OMP_NUM_THREADS": "6",
        "MKL_NUM_THREADS": "6",
    }


@pytest.mark.parametrize("said", ["No devices were found\n", "", "Failed to initialize NVML\n"])
def test_a_driver_that_finds_nothing_is_as_none(machine, said):
    machine(said)
    assert names(gpus.slots("auto", cores=1)) == ["cpu0"]


@pytest.mark.parametrize("devices", ["auto", "0", "0,1"])
@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18),
        ("No devices were found\n", 6),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
        ("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.\n", 15),
    ],
)
def test_a_driver_that_fails_gives_no_worker_on_the_cpu(machine, capsys, devices, said, status):
    """Jobs that were meant for GPUs would be taken by it, and none of them rendered in time."""
    machine(said, status=status)
    with pytest.raises(errors.GpusUnknown, match="start workers with --devices cpu") as caught:
        gpus.slots(devices, cores=1)
    assert caught.value.said == f"exit status {status}, {said.strip()}"
    told = capsys.readouterr().out
    assert "gpus.unreadable" in told
    assert said.strip() in told


def test_a_program_that_cannot_be_run_is_a_driver_that_fails(machine, tmp_path):
    machine(H200)
    (tmp_path / "bin" / "nvidia-smi").write_text("")
    with pytest.raises(errors.GpusUnknown, match="nvidia-smi is here and fails"):
        gpus.slots("auto", cores=1)


@pytest.mark.parametrize("devices", ["cpu", "sim"])
def test_a_driver_that_fails_is_not_asked_for_other_devices(machine, devices):
    machine("Driver/library version mismatch", status=18)
    assert names(gpus.slots(devices, cores=1)) == [f"{devices}0"]


@pytest.mark.parametrize("limit", ["", "-1", "NoDevFiles"])
def test_nor_where_all_gpus_are_hidden_from_us(machine, monkeypatch, limit):
    machine("Driver/library version mismatch", status=18)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", limit)
    assert names(gpus.slots("auto", cores=1)) == ["cpu0"]


@pytest.mark.parametrize(
    ("table", "status"),
    [
        (H200 + "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n", 14),
        ("Unable to determine the device handle for GPU2: GPU is lost.\n" + H200, 15),
        (H200, 255),
    ],
)
def test_good_gpus_beside_a_bad_one_are_taken(machine, capsys, table, status):
    machine(table, status=status)
    assert names(gpus.slots("auto", cores=1)) == ["gpu0", "gpu1"]
    assert names(gpus.slots("0,1", cores=1)) == ["gpu0", "gpu1"]
    told = capsys.readouterr().out
    assert f"exit status {status}" in told
    assert ("infoROM" in told, "GPU is lost" in told) == (status == 14, status == 15)
    assert "GPU-aaaa1111" not in told


def test_slices_are_found_beside_a_bad_gpu(machine):
    machine(H200, names=WITH_SLICES, status=14)
    assert names(gpus.slots("auto", cores=1)) == ["gpu0.0", "gpu0.1", "gpu1"]


def test_a_lost_gpu_that_was_left_to_us_is_not_replaced_by_the_cpu(machine, monkeypatch):
    machine("GPU is lost.\n" + H200, status=15)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(errors.GpusUnknown, match="GPU is lost"):
        gpus.slots("auto", cores=1)


@pytest.mark.parametrize(("tries", "is_told"), [(1, False), (2, True)])
def test_a_driver_that_does_not_answer_is_asked_once_more(
    machine, monkeypatch, tmp_path, tries, is_told
):
    """By its first question it may just have been woken."""
    monkeypatch.setattr(gpus, "ASK_SECONDS", 0.5)
    marks = shlex.quote(str(tmp_path / "asked"))
    # No programs but the shell's own are on PATH.
    late = f"echo x >> {marks}; n=0; while read -r _; do n=$((n + 1)); done < {marks}"
    machine(H200, before=f"{late}; if [ $n -le {tries} ]; then exec /bin/sleep 60; fi")
    if is_told:
        with pytest.raises(errors.GpusUnknown, match="timed out"):
            gpus.slots("auto", cores=1)
    else:
        assert names(gpus.slots("auto", cores=1)) == ["gpu0", "gpu1"]


def test_a_gpu_without_memory_of_its_own_is_a_gpu(machine):
    machine("0, GPU-aaaa1111, NVIDIA GB10, [N/A]\n")
    (slot,) = gpus.slots("auto", cores=1)
    assert (slot.device, slot.memory_bytes) == ("NVIDIA GB10", None)


def test_odd_lines_are_passed_over(machine):
    machine("warning: infoROM is corrupted\n\n" + H200 + "2, [Unknown Error], , \n")
    assert names(gpus.slots("auto", cores=1)) == ["gpu0", "gpu1"]


def test_each_slice_of_a_gpu_is_a_device(machine):
    machine(H200, names=WITH_SLICES)
    slots = gpus.slots("auto", cores=1)
    assert names(slots) == ["gpu0.0", "gpu0.1", "gpu1"]
    assert slots[1].device == "NVIDIA H200 MIG 1g.18gb"
    assert slots[1].environment["CUDA_VISIBLE_DEVICES"] == "MIG-dddd4444"
    assert names(gpus.slots("0.1", cores=1)) == ["gpu0.1"]


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("0,1", ["gpu0", "gpu1"]),
        ("1", ["gpu1"]),
        ("1,0", ["gpu1", "gpu0"]),
        ("GPU-bbbb2222", ["gpu1"]),
        ("GPU-bb", ["gpu1"]),
        ("GPU-", ["cpu0"]),
        ("0,7,1", ["gpu0"]),
        ("1,1", ["gpu1"]),
        ("1,GPU-bbbb2222,0", ["gpu1", "gpu0"]),
        ("", ["cpu0"]),
        ("-1", ["cpu0"]),
        ("NoDevFiles", ["cpu0"]),
    ],
)
def test_auto_keeps_to_the_gpus_that_a_scheduler_has_left_us(machine, monkeypatch, limit, left):
    machine(H200, names=NAMES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", limit)
    assert names(gpus.slots("auto", cores=1)) == left


@pytest.mark.parametrize(
    ("limit", "left"), [("MIG-dddd4444", ["gpu0.1"]), ("0", ["gpu0.0"]), ("1", ["gpu1"])]
)
def test_a_scheduler_may_leave_us_a_slice(machine, monkeypatch, limit, left):
    machine(H200, names=WITH_SLICES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", limit)
    assert names(gpus.slots("auto", cores=1)) == left


def test_a_gpu_that_belongs_to_others_is_refused(machine, monkeypatch):
    machine(H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(errors.InvalidInput, match="no GPU 0; there are: 1; CUDA_VISIBLE_DEVICES"):
        gpus.slots("0", cores=1)


@pytest.mark.parametrize(("devices", "number"), [("sim", 1), ("sim:3", 3)])
def test_simulated_devices_are_named_so_and_see_no_gpu(devices, number):
    slots = gpus.slots(devices, cores=2)
    assert [slot.short_name for slot in slots] == [f"sim{i}" for i in range(number)]
    assert {slot.device for slot in slots} == {gpus.SIMULATED}
    assert all(slot.environment["CUDA_VISIBLE_DEVICES"] == "" for slot in slots)


@pytest.mark.parametrize(("devices", "number"), [("cpu", 1), ("cpu:1", 1), ("cpu:3", 3)])
def test_cpu_workers_share_the_cores(devices, number):
    slots = gpus.slots(devices, cores=8)
    assert names(slots) == [f"cpu{index}" for index in range(number)]
    assert {slot.environment["OMP_NUM_THREADS"] for slot in slots} == {str(8 // number)}


def test_every_worker_has_a_core_however_many_there_are():
    assert gpus.slots("cpu:16", cores=2)[0].environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("", "give auto, cpu, cpu:N, sim:N or GPU numbers"),
        ("gpu", "give auto"),
        ("0;1", "give auto"),
        ("0,", "give auto"),
        ("-1", "give auto"),
        ("²", "give auto"),
        ("cpu:0", "cpu:N needs 1 to 256 workers, got 'cpu:0'"),
        ("cpu:many", "cpu:N needs"),
        ("cpu:257", "cpu:N needs"),
        ("cpu:-2", "cpu:N needs"),
        ("sim:0", "sim:N needs 1 to 256 workers, got 'sim:0'"),
        ("sim:many", "sim:N needs"),
        ("0,0", "named twice"),
        ("0,1,5,6", "no GPU 5, 6; there are: 0, 1"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_do(machine, devices, message):
    machine(H200)
    with pytest.raises(errors.InvalidInput, match=message):
        gpus.slots(devices, cores=1)


def test_gpus_are_refused_where_none_is():
    with pytest.raises(errors.InvalidInput, match="is nvidia-smi on PATH"):
        gpus.slots("0", cores=1)
