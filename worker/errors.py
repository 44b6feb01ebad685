"""What can go wrong while rendering, one class per thing that the job system does differently."""

from jobs import errors, states


class RenderError(errors.RushesError):
    """An attempt failed; `kind` says what follows."""

    kind = states.FailureKind.INTERNAL


class SpecUnusable(RenderError):
    """The model or its networks cannot render what the job asks for: not here and not anywhere."""

    kind = states.FailureKind.INPUT


class LoraUnfit(RenderError):
    """A LoRA that the job asks for can be read, and does not fit its model."""

    kind = states.FailureKind.INPUT


class Refused(RenderError):
    """The user's safety check said no to the prompt or to frames. Final."""

    kind = states.FailureKind.REFUSED


class CheckBreaksAgain(RenderError):
    """The user's safety check fails for this job time and again: then it is the job's fault."""

    kind = states.FailureKind.CHECK


class NotFinite(RenderError):
    """The networks computed NaN or infinity: the video would be black."""


class HostFault(RenderError):
    """Not the job's fault: it goes back at no cost, and its worker takes none such for a while."""

    is_of_all_queues = False
    """Or only of the job's own."""


class WeightsAbsent(HostFault):
    """This host does not have the model: it is gone, incomplete or cannot be read."""

    kind = states.FailureKind.WEIGHTS


class CheckBroken(HostFault):
    """The user's safety check failed: a service that it asks is away, or a defect of it."""

    is_of_all_queues = True
    kind = states.FailureKind.CHECK


class NotSigned(HostFault):
    """The video could not be signed, as this host is told to: certificate, or time stamp server."""

    is_of_all_queues = True
    kind = states.FailureKind.ENCODING


class EncoderBroken(HostFault):
    """ffmpeg is not there, or encodes nothing on this host with the encoder that it should use."""

    is_of_all_queues = True
    kind = states.FailureKind.ENCODING


class WeightsUnusable(RenderError):
    """A file that the job asks for in particular is missing, broken or of another model."""

    kind = states.FailureKind.WEIGHTS


class StoreUnavailable(HostFault):
    """The store does not give the job's first frame now."""

    kind = states.FailureKind.STORAGE


class ImageLost(RenderError):
    """The job's first frame is gone from the store, as this host sees it, or damaged there."""

    kind = states.FailureKind.INPUT


class DeviceOutOfMemory(RenderError):
    """The device has too little memory for this job."""

    kind = states.FailureKind.OUT_OF_MEMORY


class HostOutOfMemory(RenderError):
    """The machine, or the container, has too little main memory for this job."""

    kind = states.FailureKind.OUT_OF_MEMORY

    def __init__(
        self, *, needed_bytes: int, lacking_bytes: int, free_bytes: int, what: str
    ) -> None:
        self.needed_bytes = needed_bytes
        self.lacking_bytes = lacking_bytes
        super().__init__(
            f"main memory: needs about {needed_bytes / 1e9:.1f} GB ({what}), "
            f"{lacking_bytes / 1e9:.1f} GB too much with {free_bytes / 1e9:.1f} GB free; "
            "take a preset with less offload, 8-bit weights or no LoRA, or give this host more"
        )


class DeviceFault(RenderError):
    """The device failed. This process can no longer use it and must end."""

    kind = states.FailureKind.DEVICE


class EncodingFailed(RenderError):
    """ffmpeg failed though it works on this host, or its file is not what was asked for."""

    kind = states.FailureKind.ENCODING


class DiskUnusable(HostFault):
    """The scratch folder cannot be written: full, read-only or gone."""

    is_of_all_queues = True
    kind = states.FailureKind.DISK


class AttemptEnded(Exception):
    """Not a failure: stop rendering, this attempt is over."""


class AttemptCancelled(AttemptEnded):
    """Its job was cancelled."""


class AttemptSuperseded(AttemptEnded):
    """Its job belongs to somebody else now; say nothing more."""
