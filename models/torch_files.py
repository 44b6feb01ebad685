"""What is in a file of torch.save, without torch and without reading the tensors.

The file is a zip archive whose `data.pkl` describes the tensors, or before torch 1.6 a row of
pickles. They are unpickled with nothing but stand-ins for the few names that state dicts are made
of; any other name is refused.
"""

import collections
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

from models import errors, foreign_files
from models.safetensors_files import Entry

STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
UNTYPED_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""Those that no kind of storage is named after."""
OF_TRAINING = {"generator", "generator_ema"}
"""Keys of Self-Forcing's checkpoints, of Self-Forcing-Plus's and of CausVid's."""
TRAINING = (
    "it is a checkpoint of a training (as of Self-Forcing, Self-Forcing-Plus, CausVid): save the "
    "tensors of its generator (or generator_ema) as a file of their own; those of an "
    "autoregressive model are not rendered"
)
ARCHIVE_BEGINS = b"PK\x03\x04"
BEFORE_CONTENT = 3  # pickles of the older format: magic number, version, machine
NO_ARCHIVE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,  # encrypted, nested too deeply, or compressed in a way that is not known
    MemoryError,  # a length that the file only claims
    zipfile.BadZipFile,
    zlib.error,
)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises UnreadableWeightsError."""
    try:
        content = _read(path) if is_archive(path) else _read_older(path)
    except NO_ARCHIVE as error:
        reason = foreign_files.told(path) or f"no file of torch.save: {error}"
        raise errors.UnreadableWeightsError(path, reason) from error
    except (pickle.UnpicklingError, AttributeError, LookupError, ArithmeticError) as error:
        reason = foreign_files.told(path) or f"not only tensors: {error}"
        raise errors.UnreadableWeightsError(path, reason) from error
    if not isinstance(content, dict) or not all(isinstance(e, Entry) for e in content.values()):
        is_of_training = isinstance(content, dict) and not OF_TRAINING.isdisjoint(content)
        reason = TRAINING if is_of_training else "it holds more than named tensors"
        raise errors.UnreadableWeightsError(path, reason)
    return {str(key): entry for key, entry in content.items()}


def is_archive(path: Path) -> bool:
    """Or a row of pickles. Raises BadZipFile for the beginning of an archive."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as stream:
        if stream.read(len(ARCHIVE_BEGINS)) == ARCHIVE_BEGINS:
            raise zipfile.BadZipFile("its end is missing: copy or download it again")
    return False


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as stream:
            return _Unpickler(stream).load()


def _read_older(path: Path) -> Any:
    with path.open("rb") as stream:
        for _ in range(BEFORE_CONTENT):
            _Unpickler(stream).load()
        return _Unpickler(stream).load()


def _rebuild_tensor(dtype: str, _offset: int, shape: tuple[int, ...], *_rest: object) -> Entry:
    return Entry(dtype, tuple(map(int, shape)))


def _rebuild_untyped(
    _storage: str,
    offset: int,
    shape: tuple[int, ...],
    _stride: object,
    _requires_grad: object,
    _hooks: object,
    dtype: str,
    *_rest: object,
) -> Entry:
    return _rebuild_tensor(dtype, offset, shape)


def _rebuild_parameter(entry: Entry, *_rest: object) -> Entry:
    return entry


STAND_INS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "UntypedStorage"): "",
    ("collections", "OrderedDict"): collections.OrderedDict,
} | {("torch", name): dtype for name, dtype in (STORAGE_DTYPES | UNTYPED_DTYPES).items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> str:
        """A storage, named by its type."""
        _kind, dtype, *_rest = pid
        return str(dtype)
