"""Safetensors, one tensor at a time: neither writing nor reading holds more than one besides what the caller holds.

Files are read by plain reads and not by mapping them: mapped pages count as memory of the process until they are
dropped, and a model of many files would be there twice.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError
from benthic.base.files import write_file

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
PART = 1 << 22  # elements
PAGE = 4096  # bytes of which the system reads all or none
_HEADER_MAX = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read or made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """The dtype and shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file in the order of the names; returns its sha256. Refuses tensors that are not finite
    before anything is written."""
    for name in sorted(tensors):
        check_finite(name, tensors[name], path)
    specs = {name: Spec.of(tensors[name]) for name in sorted(tensors)}
    return write_stream(path, specs, ((name, tensors[name]) for name in specs))


def write_stream(path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`write_tensors` of tensors that are made while writing, in the order of `specs`, which they must match.

    Does not look whether they are finite: see `check_finite`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has dtype {spec.dtype} -> not written to {path}; convert it first")
        start, end = end, end + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return write_file(path, _chunks(head, specs, tensors))


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Raise CheckpointError naming the tensor that must not go to `path`."""
    if not is_finite(tensor):
        raise CheckpointError(f"tensor {name} is not finite -> not written to {path}")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype has neither NaN nor infinity. Looks at a part at a time: the test makes copies."""
    if not tensor.is_floating_point():
        return True
    return all(bool(part.to(torch.float32).isfinite().all()) for part in tensor.detach().reshape(-1).split(PART))


def _chunks(
    head: bytes, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[bytes | memoryview]:
    yield len(head).to_bytes(8, "little")
    yield head
    for (expected, spec), (name, tensor) in zip(specs.items(), tensors, strict=True):
        if (name, Spec.of(tensor)) != (expected, spec):
            raise ValueError(f"{expected} was announced as {spec}, {name} came as {Spec.of(tensor)}")
        yield _bytes(tensor.detach().cpu().contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class TensorFile:
    """One safetensors file, read tensor by tensor: `names` in their order on disk, `spec(name)`, `shape(name)`,
    `file[name]`.

    It is open only while a tensor is read. CheckpointError where it is missing, cut short or no safetensors file.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing -> give a folder that holds it")
        try:
            self._table, self._data = _table(path)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}) -> fetch it again") from error
        self.path, self.names = path, list(self._table)

    def spec(self, name: str) -> Spec:
        """Dtype and shape without reading the data."""
        return self._table[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self.spec(name).shape

    def __getitem__(self, name: str) -> Tensor:
        spec, start = self._table[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self._read(name, start, 0, [tensor])
        return tensor

    def part(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """`file[name][index]`, each slice with a start and an end, and little more is read: its rows, and of a matrix
        only its columns where they fill a page of the disk."""
        spec, start = self._table[name]
        if not index:
            return self[name]
        rows, row = index[0], math.prod(spec.shape[1:]) * spec.dtype.itemsize  # bytes
        start, count = start + rows.start * row, rows.stop - rows.start
        if len(index) == 2:
            width = index[1].stop - index[1].start
            if PAGE <= width * spec.dtype.itemsize < row:
                tensor = torch.empty(count, width, dtype=spec.dtype)
                self._read(name, start + index[1].start * spec.dtype.itemsize, row, tensor)
                return tensor
        tensor = torch.empty(count, *spec.shape[1:], dtype=spec.dtype)
        self._read(name, start, 0, [tensor])
        return tensor[(slice(None), *index[1:])].contiguous()

    def _read(self, name: str, start: int, stride: int, tensors: Iterable[Tensor]) -> None:
        """Fill tensors from places `stride` bytes apart, the first `start` bytes into the data."""
        with open(self.path, "rb", buffering=0) as file:
            for number, tensor in enumerate(tensors):
                file.seek(self._data + start + number * stride)
                memory, done = _bytes(tensor), 0
                while done < len(memory):  # the system reads at most 2 GB at once
                    got = file.readinto(memory[done:])
                    if not got:
                        raise CheckpointError(f"{self.path} ends inside of {name} -> fetch it again")
                    done += got


def _table(path: Path) -> tuple[dict[str, tuple[Spec, int]], int]:
    """(name -> dtype and shape, first byte of its data), in the order of the data; and where the data begins.

    ValueError and its kin for a header that does not describe the file to its last byte.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_MAX):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = [(name, _entry(name, entry), entry["data_offsets"]) for name, entry in header.items()]
    table, end = {}, 0
    for name, spec, (start, stop) in sorted(entries, key=lambda entry: entry[2]):
        if start != end or stop - start != spec.nbytes:
            raise ValueError(f"{name} lies at {start} to {stop}, expected {end} to {end + spec.nbytes}")
        table[name], end = (spec, start), stop
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    return table, 8 + length


def _entry(name: str, entry: Mapping[str, Any]) -> Spec:
    shape = entry["shape"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']!r}, supported: {', '.join(_DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in shape) or not all(type(n) is int for n in entry["data_offsets"]):
        raise ValueError(f"{name} has shape {shape!r} and lies at {entry['data_offsets']!r}")
    return Spec(_DTYPES[entry["dtype"]], tuple(shape))
