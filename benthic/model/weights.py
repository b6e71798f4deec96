"""The tensors of a model folder by their released names: one file or shards with an index, BF16 or block FP8."""

import json
from pathlib import Path

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError
from benthic.base.tensors import TensorFile
from benthic.kernels.quant import dequantise_blocks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"  # suffix of the factors of an FP8 weight
FP8 = (torch.float8_e4m3fn,)


class Weights:
    """`names`, `shape(name)`, `weights[name]`. FP8 blocks come out multiplied by their factors, in float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            self._files = self._shards(folder / INDEX)
        else:
            single = TensorFile(folder / WEIGHTS)
            self._files = dict.fromkeys(single.names, single)
        self.names = [name for name in self._files if not name.endswith(SCALE)]

    def _shards(self, index: Path) -> dict[str, TensorFile]:
        """Tensor name -> open shard, as the index says and the shards confirm."""
        try:
            listed = json.loads(index.read_bytes())["weight_map"]
            shards = {shard + "" for shard in listed.values()}  # a TypeError for what is no string
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of shards ({error!r}) -> fetch it again") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names {shard!r} -> shards must lie in the folder itself")
        files = {shard: TensorFile(self.folder / shard) for shard in sorted(shards)}
        held = {name: shard for shard, file in files.items() for name in file.names}
        for name in sorted(listed.keys() | held.keys()):
            if held.get(name) != listed.get(name):
                place = held.get(name, "no shard")
                raise CheckpointError(f"{index} has {name} in {listed.get(name, 'no shard')}, it is in {place}")
        return {name: files[shard] for name, shard in held.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self._files[name].shape(name)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files[name][name]
        if tensor.dtype not in FP8:
            return tensor
        if name + SCALE not in self._files:
            raise CheckpointError(f"{self.folder} has FP8 blocks of {name} but no {name + SCALE} -> fetch it again")
        scale = self._files[name + SCALE][name + SCALE]
        try:
            return dequantise_blocks(tensor, scale)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name + SCALE}: {error}") from error
