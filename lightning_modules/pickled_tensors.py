"""Numbers, arrays and tensors of pickle streams as inert records, and the streams that `torch.save` writes.

Formats: `numpy.ndarray.__reduce__` (state version 1; `_frombuffer` with protocol 5); `torch.save` in its legacy form (a
row of pickles, then the raw storages) and as an uncompressed zip archive. Every announced size is compared with the
bytes that are there before anything is allocated.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.safe_pickle import Constructor, Global, Record, read_pickle, text_keys

NUMBER_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
STORAGE_TYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_DIMENSIONS = 8
MAX_SIZE = 2**40


class NumberType(Record):
    """A `numpy.dtype` of plain numbers; its state holds the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if type(code) is not str or code not in NUMBER_TYPES:
            raise ValueError("an array type is not one of plain numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Take (version, byte order, and neither sub-array nor fields, ...)."""
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None]:
            raise ValueError("an array type is not one of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


def read_numbers(number_type: Any, data: Any, shape: Any, order: str) -> npt.NDArray[Any]:
    """Make an array of exactly these bytes, in the order of this machine."""
    raw = data.encode("latin-1") if type(data) is str else data  # Python 2 wrote bytes as text
    if type(number_type) is not NumberType or type(raw) not in (bytes, bytearray):
        raise ValueError("an array is not described by a number type and bytes")
    sizes, dtype = _sizes(shape), number_type.dtype
    if math.prod(sizes) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of {dtype} {sizes} is announced, but {len(raw)} bytes came")
    values = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))
    return values.reshape(sizes, order="F" if order == "F" else "C")


class ArrayRecord(Record):
    """A `numpy.ndarray`; empty until its state is read."""

    def __init__(self, *placeholders: Any) -> None:
        """Take what `_reconstruct` gets: the class of the array, a size and a type that the state replaces."""
        self.value: npt.NDArray[Any] = np.empty(0)

    def set_state(self, state: Any) -> None:
        """Take (version, shape, type, Fortran order, content)."""
        _, shape, number_type, is_fortran, data = state
        self.value = read_numbers(number_type, data, shape, "F" if is_fortran else "C")


def array_from_buffer(data: Any, number_type: Any, shape: Any, order: str) -> ArrayRecord:
    """Make an array as protocol 5 stores it."""
    record = ArrayRecord()
    record.value = read_numbers(number_type, data, shape, order)
    return record


def plain_number(number_type: Any, data: Any) -> int | float:
    """Turn a numpy scalar into a plain number."""
    value: int | float = read_numbers(number_type, data, (), "C").item()
    return value


def encode_latin1(text: str, encoding: str) -> bytes:
    """Give the bytes that Python 3 stores as text in protocols before 3."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("only bytes that are stored as latin1 text are expected")
    return text.encode("latin-1")


@dataclass
class Storage:
    """The memory of tensors; `unread` counts the numbers that tensors may still copy out."""

    dtype: torch.dtype
    numel: int
    data: bytes = b""
    unread: int = 0

    def fill(self, data: bytes) -> None:
        """Take the bytes, which some streams give after the tensors."""
        if len(data) != self.numel * self.dtype.itemsize:
            raise ValueError(f"a storage of {self.numel} {self.dtype} is announced, but {len(data)} bytes came")
        self.data, self.unread = data, self.numel


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a view on a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Copy the tensor out, contiguous.

        Raises:
            ValueError: if it reaches beyond its storage, or the tensors of a storage are together larger than it is.
        """
        numel, storage = math.prod(self.size), self.storage
        if numel == 0:
            return torch.empty(self.size, dtype=storage.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        storage.unread -= numel
        if storage.unread < 0 or last >= storage.numel:
            raise ValueError(f"a tensor of size {self.size} does not fit into its storage of {storage.numel} numbers")
        flat = torch.frombuffer(bytearray(storage.data), dtype=storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRecord:
    """Take the arguments of torch's function of that name."""
    sizes, strides = _sizes(size), _sizes(stride)
    if type(storage) is not Storage or type(offset) is not int or offset < 0 or len(sizes) != len(strides):
        raise ValueError("a tensor is not described by storage, offset, sizes and strides")
    return TensorRecord(storage, offset, sizes, strides)


def rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> TensorRecord:
    """Treat a parameter as a tensor."""
    if type(tensor) is not TensorRecord:
        raise ValueError("a parameter is not a tensor")
    return tensor


class DictRecord(dict[str, Any], Record):
    """A kind of dict; attributes beside its items (torch puts version numbers there) are dropped."""

    def __init__(self) -> None:
        super().__init__()

    def set_state(self, state: Any) -> None:
        """Drop the attributes."""


def _no_storage(*arguments: Any) -> Any:
    raise ValueError("a storage comes from the bytes that the file holds for it, not from a call")


NUMPY: dict[str, Constructor] = {
    "numpy dtype": NumberType,
    "numpy ndarray": ArrayRecord,
    **{f"numpy.{core}.multiarray scalar": plain_number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray _reconstruct": ArrayRecord for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": array_from_buffer for core in ("core", "_core")},
    "_codecs encode": encode_latin1,
}
STORAGES: dict[str, Constructor] = dict.fromkeys(STORAGE_TYPES, _no_storage)
TENSORS: dict[str, Constructor] = {
    "torch._utils _rebuild_tensor_v2": rebuild_tensor,
    "torch._utils _rebuild_parameter": rebuild_parameter,
    "collections OrderedDict": DictRecord,
}


def is_legacy_stream(data: bytes) -> bool:
    """Tell whether a file begins with the magic number of the legacy form of `torch.save`."""
    return data[:1] == b"\x80" and data[2:15] == b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."


def read_legacy_stream(data: bytes, constructors: Mapping[str, Constructor]) -> Any:
    """Read what `torch.save` wrote before it used zip archives.

    Raises:
        ValueError: as `read_pickle`, and if storages are missing, cut off, or followed by anything.
    """
    stream = io.BytesIO(data)
    magic, version, system = (read_pickle(stream, {}) for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise ValueError("the stream does not begin as one of torch.save")
    if system.get("little_endian") is not True:
        raise ValueError("the stream was written on a big-endian machine")
    storages: dict[str, Storage] = {}
    content = read_pickle(stream, constructors, lambda identifier: _storage(identifier, storages))
    keys = read_pickle(stream, {})
    if type(keys) is not list or sorted(text_keys(keys)) != sorted(storages):
        raise ValueError("the stream does not list the storages that its tensors use")
    for key in keys:
        position = stream.tell()
        nbytes = int.from_bytes(stream.read(8), "little") * storages[key].dtype.itemsize
        if nbytes > len(data) - stream.tell():
            raise ValueError(f"byte {position}: a storage of {nbytes} bytes is announced, but the stream ends before")
        storages[key].fill(stream.read(nbytes))
    if stream.tell() != len(data):
        raise ValueError(f"byte {stream.tell()}: {len(data) - stream.tell()} bytes follow the end of the stream")
    return content


def read_zip_archive(data: bytes) -> Any:
    """Read what `torch.save` writes: an uncompressed zip archive of a pickle and one file per storage.

    Raises:
        ValueError: as `read_pickle`, and for an archive that is damaged, compressed or of another layout.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("the zip archive is compressed, which torch.save does not do")
            if sum(entry.file_size for entry in entries) > len(data):
                raise ValueError("the entries of the zip archive overlap")
            files = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, struct.error) as error:
        raise ValueError(f"the zip archive is damaged ({error})") from error
    if "data.pkl" not in files or files.get("byteorder", b"little") != b"little":
        raise ValueError("the zip archive is not one that torch.save writes on a little-endian machine")
    storages: dict[str, Storage] = {}
    stream = io.BytesIO(files["data.pkl"])
    try:
        content = read_pickle(stream, STORAGES | TENSORS, lambda identifier: _storage(identifier, storages))
    except ValueError as error:
        raise ValueError(f"data.pkl in the zip archive, {error}") from error
    for key, storage in storages.items():
        if f"data/{key}" not in files:
            raise ValueError(f"the zip archive lacks the storage {key!a:.40}")
        storage.fill(files[f"data/{key}"])
    return content


def nested_storage(data: Any) -> Storage:
    """Read the stream of one storage that lies in a network pickle as bytes."""
    if type(data) is not bytes:
        raise ValueError("a nested stream is not bytes")
    try:
        storage = read_legacy_stream(data, STORAGES)
    except ValueError as error:
        raise ValueError(f"nested stream, {error}") from error
    if type(storage) is not Storage:
        raise ValueError("a nested stream does not hold a storage")
    return storage


def _storage(identifier: Any, storages: dict[str, Storage]) -> Storage:
    """Find or announce the storage with the identifier ("storage", type, key, device, size[, None])."""
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[5:] not in ((), (None,)):
        raise ValueError("a persistent identifier is not that of a storage")
    word, kind, key, _, numel = identifier[:5]
    if word != "storage" or type(kind) is not Global or kind.name not in STORAGE_TYPES:
        raise ValueError("a persistent identifier is not that of a storage")
    if type(key) is not str or type(numel) is not int:
        raise ValueError("a storage is not described by a key and a size")
    storage = storages.setdefault(key, Storage(STORAGE_TYPES[kind.name], numel))
    if (storage.dtype, storage.numel) != (STORAGE_TYPES[kind.name], numel):
        raise ValueError(f"the storage {key!a:.40} is described in two ways")
    return storage


def _sizes(sizes: Any) -> tuple[int, ...]:
    if type(sizes) is not tuple or len(sizes) > MAX_DIMENSIONS:
        raise ValueError("sizes are not a tuple of few numbers")
    if any(type(size) is not int or not 0 <= size < MAX_SIZE for size in sizes):
        raise ValueError("a size is not a whole number that fits into memory")
    return sizes
