"""What one job takes of the device and of main memory, and whether that fits beside the rest."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from models import memory
from worker import host_memory, wanted
from worker.device import Device

HOST_SPARE_BYTES = 512 << 20  # for everything else that runs on the machine


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of one model: what stays after a job, and what is taken amid one."""

    device_resident: int
    device_peak: int
    host_resident: int
    host_peak: int

    def kept_beside(self, before: "Share | None") -> "Share":
        """What stays after this job too: copies that an earlier one made are kept."""
        if before is None:
            return self
        return replace(self, host_resident=max(self.host_resident, before.host_resident))

    def beyond(self, held: "Share | None") -> int:
        """Main memory that a job takes on top of what its model has taken already."""
        return max(self.host_peak - (held.host_resident if held else 0), 0)


def share_of(need: memory.Need, device: Device) -> Share:
    """The one place where an estimate becomes what is accounted for."""
    # The estimate is in bf16; a worker on a CPU computes in fp32.
    scale = device.dtype.itemsize / memory.COMPUTE_BYTES
    resident = int(need.resident_bytes * scale)
    peak = int((need.device_bytes - memory.DEVICE_CONTEXT_BYTES) * scale)
    host = int(need.host_bytes * scale)
    if device.is_cuda:
        return Share(device_resident=resident, device_peak=peak, host_resident=host, host_peak=host)
    return Share(
        device_resident=0, device_peak=0, host_resident=resident + host, host_peak=peak + host
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory for models; None: what there is."""

    device: Device
    device_bytes: int | None = None
    host_bytes: int | None = None

    def device_lacks(self, its: Share, others: Iterable[Share]) -> int:
        """Bytes that are missing on the device for this job beside these models; 0: none."""
        if not its.device_peak:
            return 0
        total = self.device_bytes or self.device.total_bytes()
        taken = its.device_peak + sum(other.device_resident for other in others)
        return max(taken - int(total * (1 - wanted.SPARE_SHARE)), 0)

    def host_lacks(
        self,
        its: Share,
        others: Iterable[Share],
        *,
        held: Share | None,
        pending_bytes: int = 0,
    ) -> int:
        """The same of main memory, of which `held` is what this model has taken already.

        `pending_bytes` are others' that they are about to take.
        """
        more = its.beyond(held)
        if not more:
            return 0
        # Measured, not added up: other processes take from the same memory.
        lacking = more - (host_memory.now().free_bytes - pending_bytes - HOST_SPARE_BYTES)
        if self.host_bytes is not None:
            taken = its.host_peak + sum(other.host_resident for other in others)
            lacking = max(lacking, taken - self.host_bytes)
        return max(lacking, 0)
