"""What a render process says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A loaded model, with what it takes while no job renders."""

    model: str
    loras: tuple[str, ...]
    memory: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a render process says of itself; counts since it began."""

    renders: int
    loads: int
    lora_switches: int
    resident: tuple[Resident, ...]
    device_used_bytes: int | None
    host_used_bytes: int
