"""The tensors of a model folder by their released names: one file, shards with an index, or DeepSeek's ranks.

BF16 and block FP8 alike. Only headers are read until a tensor is asked for, and nothing is kept of it afterwards.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError
from benthic.base.tensors import Spec, TensorFile, is_finite
from benthic.kernels.quant import BLOCK, dequantise_blocks
from benthic.model import native
from benthic.model.linear import FP8, SCALE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FACTORS = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
Index = tuple[slice, ...]
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Files:
    """The Hugging Face layout as stored, factors and all: `names`, `spec(name)`, `read(name)`."""

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            self._files = _shards(folder / INDEX)
        else:
            single = TensorFile(folder / WEIGHTS)
            self._files = dict.fromkeys(single.names, single)
        self.names = list(self._files)

    def spec(self, name: str) -> Spec:
        """Dtype and shape without reading the data."""
        return self._files[name].spec(name)

    def read(self, name: str, index: Index = ()) -> Tensor:
        """The tensor as stored, or a part of it."""
        return self._files[name].part(name, index) if index else self._files[name][name]


def _shards(index: Path) -> dict[str, TensorFile]:
    """Tensor name -> its shard, as the index says and the shards confirm."""
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        shards = {shard + "" for shard in listed.values()}  # a TypeError for what is no string
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}) -> fetch it again") from error
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r} -> shards must lie in the folder itself")
    files = {shard: TensorFile(index.parent / shard) for shard in sorted(shards)}
    held: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.names:
            if name in held:
                raise CheckpointError(f"{index.parent} has {name} in {held[name]} and in {shard} -> fetch it again")
            held[name] = shard
    for name in sorted(listed.keys() | held.keys()):
        if held.get(name) != listed.get(name):
            place = held.get(name, "no shard")
            raise CheckpointError(f"{index} has {name} in {listed.get(name, 'no shard')}, it is in {place}")
    return {name: files[shard] for name, shard in held.items()}


def stored(folder: Path) -> Files | native.Ranks:
    """The layout that lies in `folder`; CheckpointError where both do, because they might differ."""
    ranks = native.rank_files(folder)
    released = [name for name in (INDEX, WEIGHTS) if (folder / name).is_file()]
    if ranks and released:
        raise CheckpointError(f"{folder} holds {released[0]} and {ranks[0].name} -> keep one of the two layouts")
    return native.Ranks(folder) if ranks else Files(folder)


class Weights:
    """`names`, `shape(name)`, `weights[name]`. FP8 blocks come out multiplied by their factors, in float32.

    `stored(name)` gives the same as it lies on disk: the tensor, with FP8 blocks also their factors.
    """

    def __init__(self, folder: Path):
        self.folder, self._stored = folder, stored(folder)
        held = set(self._stored.names)
        self.names = [name for name in self._stored.names if not name.endswith(SCALE)]
        self._factors = {name: name + SCALE for name in self.names if self._stored.spec(name).dtype == FP8}
        for name, factor in self._factors.items():
            self._check_factors(name, factor, held)
        for name in sorted(n for n in held if n.endswith(SCALE) and n.removesuffix(SCALE) not in self._factors):
            raise CheckpointError(f"{folder} has {name} but no FP8 blocks of {name.removesuffix(SCALE)}")

    def _check_factors(self, name: str, factor: str, held: set[str]) -> None:
        if factor not in held:
            raise CheckpointError(f"{self.folder} has FP8 blocks of {name} but no {factor} -> fetch it again")
        shape, found = self.shape(name), self._stored.spec(factor)
        expected = tuple(-(-n // BLOCK) for n in shape)
        if len(shape) != 2 or found.shape != expected or found.dtype not in FACTORS:
            raise CheckpointError(
                f"{self.folder}: {factor} is {found.dtype} {found.shape}, FP8 blocks of shape {shape} need {expected}"
            )

    def specs(self, name: str) -> dict[str, Spec]:
        """Dtype and shape of each tensor of `stored(name)`."""
        return {part: self._stored.spec(part) for part in self._parts(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self._stored.spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self._stored.spec(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes on disk, with the factors."""
        return sum(spec.nbytes for spec in self.specs(name).values())

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensor as stored, with FP8 blocks also their factors, by name."""
        return {part: self._stored.read(part) for part in self._parts(name)}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, tuple(slice(0, size) for size in self.shape(name)))

    def read(self, name: str, index: Index) -> Tensor:
        """A part of the tensor: `weights.read(name, index)` is `weights[name][index]`, and little more is read. Each
        slice has a start and an end."""
        if name not in self._factors:
            return self._stored.read(name, index)
        blocks = tuple(slice(s.start // BLOCK, -(-s.stop // BLOCK)) for s in index)  # those that the part touches
        ends = self.shape(name)
        touched = tuple(slice(b.start * BLOCK, min(b.stop * BLOCK, end)) for b, end in zip(blocks, ends))
        values = self._stored.read(name, touched)
        whole = dequantise_blocks(values, self._stored.read(self._factors[name], blocks))
        return whole[tuple(slice(s.start - t.start, s.stop - t.start) for s, t in zip(index, touched))]

    def _parts(self, name: str) -> list[str]:
        return [name, self._factors[name]] if name in self._factors else [name]

    def misfits(self, wanted: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What keeps the folder from being exactly the tensors `wanted` (name -> shape), with or without `optional`."""
        known, held = {**wanted, **optional}, set(self.names)
        problems = [f"missing {n} {wanted[n]}" for n in sorted(wanted.keys() - held)]
        problems += [f"unexpected {n} {self.shape(n)}" for n in sorted(held - known.keys())]
        for name in self.names:
            if name in known and self.shape(name) != known[name]:
                problems.append(f"{name} has shape {self.shape(name)}, expected {known[name]}")
            elif name in known and self.dtype(name) not in (*PLAIN, FP8):
                problems.append(f"{name} has dtype {self.dtype(name)}, which no weight has")
        return problems


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. CheckpointError where float16, which ends at 65504, would turn a number into infinity."""
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and not is_finite(narrow):
        most = tensor.float().abs().max().item()
        raise CheckpointError(f"{name} holds {most:.6g}, float16 ends at 65504 -> use bfloat16 or float32")
    return narrow
