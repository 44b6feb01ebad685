"""How this worker renders; beside `jobs.settings`, which says where things are."""

from pathlib import Path

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs import errors

LONGEST_SECONDS = 7 * 24 * 3600


class WorkerSettings(BaseSettings):
    """From the environment or `.env`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_file=".env", env_ignore_empty=True
    )

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|sim|cuda(:\d+)?)$",
        validation_alias=AliasChoices("RUSHES_DEVICE"),
        description="Device of this process: `auto`, `cpu`, `cuda` or `sim`. The launcher sets it.",
    )
    worker_name: str = Field(
        "worker@localhost",
        validation_alias=AliasChoices("RUSHES_WORKER_NAME"),
        description="Name of this process. The launcher sets it.",
    )
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        validation_alias=AliasChoices("RUSHES_DTYPE"),
        description="Of the networks; `auto` is bfloat16 on a GPU and float32 on a CPU.",
    )
    attention: str = Field(
        "auto",
        pattern="^(auto|torch|flash3|flash4|sage)$",
        validation_alias=AliasChoices("RUSHES_ATTENTION"),
        description="Kernel of attention; `auto` is the fastest that is right, of torch's own.",
    )
    compile: str = Field(
        "auto",
        pattern="^(auto|on|off)$",
        validation_alias=AliasChoices("RUSHES_COMPILE"),
        description="Whether torch's compiler joins small operations; `auto` does so on a GPU.",
    )
    heartbeat_seconds: float = Field(
        10.0,
        gt=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_HEARTBEAT_SECONDS"),
        description="A lease is renewed this often; at most a third of RUSHES_LEASE_SECONDS.",
    )
    stall_seconds: float = Field(
        900.0,
        gt=0,
        le=LONGEST_SECONDS,
        validation_alias=AliasChoices("RUSHES_STALL_SECONDS"),
        description="Without progress for this long, the lease is no longer renewed.",
    )
    sim_step_seconds: float = Field(
        1.0,
        ge=0,
        le=600,
        validation_alias=AliasChoices("RUSHES_SIM_STEP_SECONDS"),
        description="A denoising step on a simulated device; other stages keep their proportion.",
    )
    sim_encodes: bool = Field(
        False,
        validation_alias=AliasChoices("RUSHES_SIM_ENCODES"),
        description="Encode and check each video of a simulated device, as those of a real one are;"
        " otherwise one test card per size serves all.",
    )
    sim_bad_devices: Path | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_SIM_BAD_DEVICES"),
        description="File with a line for each simulated device that is broken: `sim0@host device`,"
        " or `crash`, `hang`, `internal`.",
    )
    frame_check: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_FRAME_CHECK"),
        description="`module:function` that may refuse frames before anything is uploaded.",
    )
    c2pa_certificate: Path | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_C2PA_CERTIFICATE"),
        description="PEM file with the signer's certificate and those above it: signs every video.",
    )
    c2pa_key: Path | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_C2PA_KEY"),
        description="PEM file with the signer's private key.",
    )
    c2pa_algorithm: str = Field(
        "es256",
        pattern="^(es256|es384|es512|ps256|ps384|ps512|ed25519)$",
        validation_alias=AliasChoices("RUSHES_C2PA_ALGORITHM"),
        description="That of the key.",
    )
    c2pa_timestamp_url: str | None = Field(
        None,
        validation_alias=AliasChoices("RUSHES_C2PA_TIMESTAMP_URL"),
        description="Of a time stamp authority: signatures then outlive the certificate.",
    )
    traces: bool = Field(
        False,
        validation_alias=AliasChoices("RUSHES_TRACES"),
        description="Send OpenTelemetry spans, to where OTEL_EXPORTER_OTLP_ENDPOINT says.",
    )
    encoder: str = Field(
        "x264",
        pattern="^(x264|nvenc|auto)$",
        validation_alias=AliasChoices("RUSHES_ENCODER"),
        description=(
            "Of H.264: the processor's, or nvenc, the GPU's own, which spares cores; A100, H100 "
            "and H200 have none. auto is nvenc where it works."
        ),
    )
    x264_preset: str = Field(
        "medium",
        pattern="^(ultrafast|superfast|veryfast|faster|fast|medium|slow|slower|veryslow)$",
        validation_alias=AliasChoices("RUSHES_X264_PRESET"),
        description="Speed of H.264 encoding against file size.",
    )
    x264_crf: int = Field(
        18,
        ge=1,  # 0 would be lossless, in a profile that players do not play
        le=51,
        validation_alias=AliasChoices("RUSHES_X264_CRF"),
        description="Quality of H.264: lower is better, 18 is visually lossless. nvenc's too.",
    )

    @field_validator("sim_bad_devices", "c2pa_certificate", "c2pa_key")
    @classmethod
    def _of_user(cls, path: Path | None) -> Path | None:
        try:
            return path and path.expanduser()
        except RuntimeError:
            raise ValueError(f"{path}: this machine has no user of this name with a home") from None


def load() -> WorkerSettings:
    """A bad value is reported by its environment name."""
    try:
        return WorkerSettings()
    except ValidationError as error:
        raise errors.InvalidInput(
            "settings",
            [
                errors.Problem(line=None, message=f"{detail['loc'][0]}: {detail['msg']}")
                for detail in error.errors()
            ],
        ) from None
