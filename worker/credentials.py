"""Content Credentials: a signed C2PA manifest in the video, where a certificate is configured."""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import errors as job_errors
from worker import errors, provenance
from worker.settings import WorkerSettings


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who signs. The key is in no log and no representation."""

    certificates: bytes = field(repr=False)
    """PEM: the signer's first, then up to its root."""
    key: bytes = field(repr=False)
    algorithm: str
    timestamp_url: str | None

    def sign(self, path: Path, origin: provenance.Origin) -> None:
        """Replace a finished mp4 by its signed form. NotSigned: none leaves this host unsigned."""
        c2pa = importlib.import_module("c2pa")
        signed = path.with_suffix(".signed.mp4")
        signed.unlink(missing_ok=True)
        try:
            with (
                self._signer(c2pa) as signer,
                c2pa.Builder(json.dumps(_manifest(origin))) as builder,
            ):
                builder.sign_file(path, signed, signer)
        except (c2pa.C2paError, ValueError) as error:
            signed.unlink(missing_ok=True)
            raise errors.NotSigned(f"the video could not be signed: {error}") from error
        signed.replace(path)

    def _signer(self, c2pa: Any) -> Any:
        url = None if self.timestamp_url is None else self.timestamp_url.encode()
        info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, url)
        return c2pa.Signer.from_info(info)


def load(worker_settings: WorkerSettings) -> Credentials | None:
    """None: nothing is signed. InvalidInput when what is configured cannot be used."""
    certificate, key = worker_settings.c2pa_certificate, worker_settings.c2pa_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise _unusable("RUSHES_C2PA_CERTIFICATE and RUSHES_C2PA_KEY belong together")
    try:
        found = Credentials(
            certificates=certificate.read_bytes(),
            key=key.read_bytes(),
            algorithm=worker_settings.c2pa_algorithm,
            timestamp_url=worker_settings.c2pa_timestamp_url,
        )
        c2pa = importlib.import_module("c2pa")
    except OSError as error:
        raise _unusable(f"RUSHES_C2PA_...: {error}") from error
    except ImportError:
        raise _unusable(
            "signing needs the library c2pa-python: pip install 'rushes[c2pa]'"
        ) from None
    try:
        with found._signer(c2pa):
            pass
    except (c2pa.C2paError, ValueError) as error:
        raise _unusable(f"RUSHES_C2PA_CERTIFICATE or RUSHES_C2PA_KEY: {error}") from error
    return found


def _unusable(message: str) -> job_errors.InvalidInput:
    return job_errors.InvalidInput("settings", [job_errors.Problem(line=None, message=message)])


def _manifest(origin: provenance.Origin) -> dict[str, Any]:
    name, _, version = provenance.tool().partition(" ")
    created = {
        "action": "c2pa.created",
        "digitalSourceType": origin.source_type,
        "softwareAgent": {"name": name, "version": version},
    }
    return {
        "claim_generator_info": [{"name": name, "version": version}],
        "title": origin.identifier,
        "format": "video/mp4",
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }
