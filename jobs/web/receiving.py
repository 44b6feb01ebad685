"""Uploaded files, checked and laid into the store."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from starlette.datastructures import UploadFile

from jobs import database, errors, holds, images, storage, uploads
from jobs.schema import StoredFile
from jobs.web import access, service

COPY_BYTES = 1 << 20
KIND = "application/octet-stream"  # as they are served, whatever the sender calls them


def image(serving: service.Service, principal: access.Principal, file: UploadFile) -> bytes:
    """The bytes of an image. InvalidInput when it is none that can be rendered from."""
    try:
        with serving.check_turns.taken(principal.sees):
            data = file.file.read(images.LIMITS.max_bytes + 1)  # those who wait hold no memory
            images.examine(data, file.filename or "the image")
    except images.ImageError as error:
        raise errors.invalid(file.filename or "image", str(error.problem)) from None
    return data


def keep(
    serving: service.Service, principal: access.Principal, file: UploadFile, *, purpose: str
) -> StoredFile:
    """The row of a file that is in the store now."""
    file.file.seek(0)
    with serving.db.reading() as session:
        file_id = uploads.new_id(database.now(session))
    with tempfile.TemporaryDirectory(prefix="rushes-upload-") as folder:
        path = Path(folder, "file")
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target, COPY_BYTES)
        with serving.storing():
            serving.writing_guard.require()
            if purpose == uploads.IMAGE:
                stored = _keep_image(serving, path)
            else:
                stored = serving.store.put_file(path, uploads.own_key(file_id), content_type=KIND)
    with serving.db.transaction() as session:
        return uploads.add(
            session,
            stored,
            file_id=file_id,
            owner=principal.owner,
            purpose=purpose,
            name=file.filename or "file",
        )


def _keep_image(serving: service.Service, path: Path) -> storage.StoredObject:
    with path.open("rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
    holds.hold_all(serving.db, [uploads.shared_key(sha256)])
    return uploads.keep_shared(serving.store, path, sha256=sha256, content_type=KIND)
