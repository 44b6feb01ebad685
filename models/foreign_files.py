"""What a file is that could not be read as what its name says."""

from pathlib import Path

POINTER_BEGINS = b"version https://git-lfs"
POINTER = "it is a Git LFS pointer, not the file: `git lfs pull` or `hf download` brings that"
SAFETENSORS_BEGINS = b'{"'
"""After 8 bytes of length."""
SAFETENSORS = "it is a safetensors file under another name"


def told(path: Path) -> str:
    """Empty where that is not known, or the file cannot be opened."""
    try:
        with path.open("rb") as stream:
            beginning = stream.read(len(POINTER_BEGINS))
    except OSError:
        return ""
    if beginning == POINTER_BEGINS:
        return POINTER
    is_safetensors = beginning[8:].startswith(SAFETENSORS_BEGINS)
    return SAFETENSORS if is_safetensors and path.suffix != ".safetensors" else ""
