"""Safetensors written tensor by tensor (never a second copy of the model in memory) and read with named errors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file in the order of the names; returns its sha256. Refuses tensors that are not finite."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype} -> not written to {path}; convert it first")
        if tensor.is_floating_point() and not tensor.to(torch.float32).isfinite().all():
            raise CheckpointError(f"tensor {name} is not finite -> not written to {path}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return write_file(path, _chunks(head, tensors))


def _chunks(head: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield len(head).to_bytes(8, "little")
    yield head
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


class TensorFile:
    """One safetensors file, read tensor by tensor: `names`, `shape(name)`, `file[name]`."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing -> give a folder that holds it")
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}) -> fetch it again") from error
        self.path, self.names = path, list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
