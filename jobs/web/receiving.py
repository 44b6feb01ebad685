"""Uploaded files, checked and laid into the store."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from starlette.datastructures import UploadFile

from jobs import holds, images, uploads
from jobs.schema import StoredFile
from jobs.web import access, service

COPY_BYTES = 1 << 20


def image(file: UploadFile) -> bytes:
    """The bytes of an image. InvalidInput when it is none that can be rendered from."""
    data = file.file.read(images.LIMITS.max_bytes + 1)
    try:
        images.examine(data, file.filename or "the image")
    except images.ImageError as error:
        raise service.invalid(file.filename or "image", str(error.problem)) from None
    return data


def keep(
    serving: service.Service, principal: access.Principal, file: UploadFile, *, purpose: str
) -> StoredFile:
    """The row of a file that is in the store now."""
    file.file.seek(0)

    with tempfile.TemporaryDirectory(prefix="rushes-upload-") as folder:
        path = Path(folder, "file")
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target, COPY_BYTES)
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256")
        kind, sha256 = file.content_type or "application/octet-stream", digest.hexdigest()
        holds.hold_all(serving.db, [uploads.key_of(sha256)])
        stored = uploads.keep(serving.store, path, sha256=sha256, content_type=kind)
    with serving.db.transaction() as session:
        return uploads.add(
            session,
            stored,
            owner=principal.owner,
            purpose=purpose,
            name=file.filename or "file",
        )
