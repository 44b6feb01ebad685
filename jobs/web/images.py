"""Images of prompts that came over the network: uploaded, given with the request, or addresses."""

from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from jobs import database, errors, images, inputs, uploads

GIVEN = "given:"
UPLOAD = "upload:"


@dataclass
class WebImages(inputs.InputImages):
    """No file of this machine, and of its buckets only what the sender may read anyway."""

    db: database.Database | None = None
    owner: str | None = ""
    """Whose uploads; None: everybody's."""
    may_read_buckets: bool = False
    given: dict[str, bytes] = field(default_factory=dict)
    """Images that came with the request, by the name that rows call them."""

    def give(self, data: bytes) -> str:
        """What a row calls this image."""
        name = f"{GIVEN}{len(self.given)}"
        self.given[name] = data
        return name

    def read(self, source: str) -> images.FetchedImage:
        if source in self.given:
            return images.examine(self.given[source], "the image")
        if source.startswith(UPLOAD):
            return self._uploaded(source)
        if images.scheme_of(source) == "s3" and not self.may_read_buckets:
            raise images.ImageUnusable(
                "s3 address", "is for admin tokens only: upload the image, or give https://"
            )
        return super().read(source)

    def _uploaded(self, source: str) -> images.FetchedImage:
        assert self.db is not None
        assert self.store is not None
        file_id = source.removeprefix(UPLOAD)
        with self.db.reading() as session:
            key = _key(session, file_id, self.owner)
        if key is None:
            raise images.ImageUnusable(source[:60], "there is no such upload")
        return images.examine(self.store.read_bytes(key), source[:60])


def _key(session: Session, file_id: str, owner: str | None) -> str | None:
    try:
        return uploads.find(session, file_id, owner=owner).key
    except errors.NotFound:
        return None
