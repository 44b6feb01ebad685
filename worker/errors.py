"""What can go wrong while rendering, one class per thing that the job system does differently."""

from jobs import errors, states


class RenderError(errors.RushesError):
    """An attempt failed; `kind` says what follows."""

    kind = states.FailureKind.INTERNAL


class SpecUnusable(RenderError):
    """The networks cannot render what the job asks for: not here and not anywhere."""

    kind = states.FailureKind.INPUT


class NotFinite(RenderError):
    """The networks computed NaN or infinity: the video would be black."""


class WeightsUnusable(RenderError):
    """Missing, broken or of another model."""

    kind = states.FailureKind.WEIGHTS


class ImageUnavailable(RenderError):
    """The store does not give the job's first frame."""

    kind = states.FailureKind.STORAGE


class DeviceOutOfMemory(RenderError):
    """The device has too little memory for this job."""

    kind = states.FailureKind.OUT_OF_MEMORY


class DeviceFault(RenderError):
    """The device failed. This process can no longer use it and must end."""

    kind = states.FailureKind.DEVICE


class EncodingFailed(RenderError):
    """ffmpeg failed, or its file is not the video that was asked for."""

    kind = states.FailureKind.ENCODING


class DiskUnusable(RenderError):
    """The scratch folder cannot be written: full, read-only or gone."""

    kind = states.FailureKind.DISK


class AttemptEnded(Exception):
    """Not a failure: stop rendering, this attempt is over."""


class AttemptCancelled(AttemptEnded):
    """Its job was cancelled."""


class AttemptSuperseded(AttemptEnded):
    """Its job belongs to somebody else now; say nothing more."""
