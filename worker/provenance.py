"""What a video says of itself: made by a machine, by which program, for which job.

Twice, because each is lost somewhere: as XMP, where the IPTC's readers look for it, in a box of its
own behind the frames; and as a comment among the tags, which outlives a copy of the streams.
Both are the same for every attempt at a job.
"""

import importlib.metadata
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from jobs import lifecycle

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = VOCABULARY + "trainedAlgorithmicMedia"
"""Made by a model that learned from samples."""
ALGORITHMIC = VOCABULARY + "algorithmicMedia"
"""Made by a program that learned nothing: a simulated device's test card."""

XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")  # XMP specification, part 3, MPEG-4
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    Iptc4xmpExt:DigitalSourceType={source_type}
    dc:identifier={identifier}
    xmp:CreatorTool={tool}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a video comes from."""

    batch_id: str
    job_id: int
    source_type: str = TRAINED
    """A term of the IPTC's vocabulary of digital source types."""

    @classmethod
    def of(cls, claim: lifecycle.Claim, *, source_type: str = TRAINED) -> "Origin":
        return cls(batch_id=claim.batch_id, job_id=claim.job_id, source_type=source_type)

    @property
    def identifier(self) -> str:
        """The job's number is unique in one database, the batch's id in the world."""
        return f"{self.batch_id}/{self.job_id}"

    @property
    def comment(self) -> str:
        """For people, and for programs that read tags and no XMP."""
        how = "AI-generated video" if self.source_type == TRAINED else "Computer-generated video"
        return f"{how} ({self.source_type}), {tool()} job {self.identifier}"


def tool() -> str:
    return f"rushes {importlib.metadata.version('rushes')}"


def mark(path: Path, origin: Origin) -> None:
    """Add the XMP to a finished mp4. Nothing before it moves, so every player reads it as before.

    OSError when the file cannot be written.
    """
    with path.open("ab") as file:
        file.write(box(origin))


def box(origin: Origin) -> bytes:
    """An mp4 box of type `uuid` that holds the XMP packet."""
    packet = PACKET.format(
        source_type=quoteattr(origin.source_type),
        identifier=quoteattr(origin.identifier),
        tool=quoteattr(tool()),
    ).encode()
    return struct.pack(">I4s16s", 24 + len(packet), b"uuid", XMP_BOX.bytes) + packet
