"""What is accounted for, on a device of its own and on a processor, and what is missing."""

import pytest
import torch

from models import memory
from worker import device, host_memory, room

GIB = 1 << 30
CONTEXT = memory.DEVICE_CONTEXT_BYTES
NEED = memory.Need(
    stages={
        "text": {"device context": CONTEXT, "transformer": 8, "text encoder": 4, "activations": 1},
        "denoise": {"device context": CONTEXT, "transformer": 8, "activations": 20},
        "decode": {"device context": CONTEXT, "transformer": 8, "vae": 2, "activations": 3},
    },
    host={"text encoder": 4, "weights without LoRA": 8},
)


def on(kind, dtype=torch.bfloat16):
    return device.Device(torch_device=torch.device(kind), dtype=dtype, name=kind)


def test_what_stays_and_what_a_job_takes_are_apart():
    """Visitors of one stage and activations go; the context of CUDA is nobody's."""
    share = room.share_of(NEED, on("cuda"))
    assert (share.device_resident, share.device_peak) == (8, 28)
    assert (share.host_resident, share.host_peak) == (12, 12)


def test_on_a_processor_all_of_it_is_main_memory():
    share = room.share_of(NEED, on("cpu", torch.float32))
    assert (share.device_resident, share.device_peak) == (0, 0)
    assert (share.host_resident, share.host_peak) == (2 * (8 + 12), 2 * (28 + 12))


@pytest.mark.parametrize(("others", "lacks"), [([], 0), ([8], 0), ([8, 8], 6)])
def test_a_device_lacks_what_others_hold_beside_this_job(others, lacks):
    total = 40  # 38 without the spare share
    here = room.Room(device=on("cuda"), device_bytes=total)
    share = room.share_of(NEED, on("cuda"))
    held = [
        room.Share(device_resident=each, device_peak=0, host_resident=0, host_peak=0)
        for each in others
    ]
    assert here.device_lacks(share, held) == lacks


def test_main_memory_that_is_held_already_is_not_asked_for_again(monkeypatch):
    free = host_memory.HostMemory(total_bytes=9 * GIB, free_bytes=room.HOST_SPARE_BYTES + 5)
    monkeypatch.setattr(host_memory, "now", lambda: free)
    here = room.Room(device=on("cuda"))
    share = room.share_of(NEED, on("cuda"))
    assert here.host_lacks(share, [], held=None) == 12 - 5
    assert here.host_lacks(share, [], held=share) == 0
    before = room.Share(device_resident=8, device_peak=28, host_resident=4, host_peak=4)
    assert here.host_lacks(share, [], held=before) == 12 - 4 - 5
    # A limit that was set is no promise that there is so much.
    generous = room.Room(device=on("cuda"), host_bytes=1 << 40)
    assert generous.host_lacks(share, [], held=None) == 12 - 5
