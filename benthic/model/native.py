"""DeepSeek's own inference layout: one file per tensor-parallel rank, `model{rank}-mp{n}.safetensors`, short names.

Ranks split what their inference script computes in parallel: along output rows, along input columns, or by experts. The
factors of FP8 weights are split like their weights. There is no prediction module.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError
from benthic.base.tensors import Spec, TensorFile

ROWS, COLUMNS, WHOLE, EXPERTS = "rows", "columns", "whole", "experts"
_MODEL = {"embed": ("model.embed_tokens", ROWS), "norm": ("model.norm", WHOLE), "head": ("lm_head", ROWS)}
_LAYER = {
    "attn_norm": ("input_layernorm", WHOLE),
    "ffn_norm": ("post_attention_layernorm", WHOLE),
    "attn.wq": ("self_attn.q_proj", ROWS),
    "attn.wq_a": ("self_attn.q_a_proj", WHOLE),
    "attn.q_norm": ("self_attn.q_a_layernorm", WHOLE),
    "attn.wq_b": ("self_attn.q_b_proj", ROWS),
    "attn.wkv_a": ("self_attn.kv_a_proj_with_mqa", WHOLE),
    "attn.kv_norm": ("self_attn.kv_a_layernorm", WHOLE),
    "attn.wkv_b": ("self_attn.kv_b_proj", ROWS),
    "attn.wo": ("self_attn.o_proj", COLUMNS),
    "ffn.gate": ("mlp.gate", WHOLE),
}
_FFN = {"w1": ("gate_proj", ROWS), "w2": ("down_proj", COLUMNS), "w3": ("up_proj", ROWS)}
_ENDS = {"weight": "weight", "scale": "weight_scale_inv"}
BIAS = "mlp.gate.e_score_correction_bias"
_NAME = re.compile(r"(?:layers\.(\d+)\.)?([\w.]+?)\.(weight|scale|bias)")
_INNER = re.compile(r"ffn\.(?:(shared_experts)\.|experts\.(\d+)\.)?(w[123])")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its short name, how ranks share it, and the expert it belongs to (-1 for none)."""

    short: str
    share: str
    expert: int = -1


def released(short: str) -> tuple[str, Place] | None:
    """The Hugging Face name of a short name, with its place; None for a name that the layout does not have."""
    match = _NAME.fullmatch(short)
    if match is None:
        return None
    layer, part, end = match.groups()
    if layer is None:
        if part not in _MODEL or end == "bias":
            return None
        name, share = _MODEL[part]
        return f"{name}.{_ENDS[end]}", Place(short, share)
    prefix = f"model.layers.{layer}"
    if end == "bias":
        return (f"{prefix}.{BIAS}", Place(short, WHOLE)) if part == "ffn.gate" else None
    if part in _LAYER:
        name, share = _LAYER[part]
        return f"{prefix}.{name}.{_ENDS[end]}", Place(short, share)
    inner = _INNER.fullmatch(part)
    if inner is None:
        return None
    shared, expert, projection = inner.groups()
    name, share = _FFN[projection]
    if expert is not None:
        return f"{prefix}.mlp.experts.{int(expert)}.{name}.{_ENDS[end]}", Place(short, EXPERTS, int(expert))
    inside = "mlp.shared_experts" if shared else "mlp"
    return f"{prefix}.{inside}.{name}.{_ENDS[end]}", Place(short, share)


def rank_files(folder: Path) -> list[Path]:
    """The files of `folder` that are named like ranks, whether they belong together or not."""
    return sorted(path for path in folder.glob("model*-mp*.safetensors") if _numbers(path) is not None)


def _numbers(path: Path) -> tuple[int, int] | None:
    """(rank, number of ranks) that a file name says, or None."""
    match = re.fullmatch(r"model(\d+)-mp(\d+)\.safetensors", path.name)
    return (int(match[1]), int(match[2])) if match else None


class Ranks:
    """The layout as stored, under released names and put together: `names`, `spec(name)`, `read(name)`."""

    def __init__(self, folder: Path):
        self.folder, self._files = folder, _open(folder)
        self._places: dict[str, Place] = {}
        for file in self._files:
            for short in file.names:
                found = released(short)
                if found is None:
                    raise CheckpointError(f"{file.path} holds {short} -> no name of DeepSeek's inference layout")
                self._places[found[0]] = found[1]
        experts = max((place.expert for place in self._places.values()), default=-1) + 1
        if experts % len(self._files):
            raise CheckpointError(f"{folder}: {experts} experts do not divide among {len(self._files)} ranks")
        self._experts_each = experts // len(self._files)
        self._held = [set(file.names) for file in self._files]
        self.names = list(self._places)
        self._specs = {name: self._put_together(place) for name, place in self._places.items()}

    def spec(self, name: str) -> Spec:
        """Dtype and shape of the whole tensor, without reading the data."""
        return self._specs[name]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor or a part of it, for which the whole is read. CheckpointError where ranks that hold the same one
        differ."""
        return self._whole(name)[index]

    def _whole(self, name: str) -> Tensor:
        place, spec = self._places[name], self._specs[name]
        owners = self._owners(place)
        if place.share in (WHOLE, EXPERTS):
            first = self._files[owners[0]][place.short]
            for rank in owners[1:]:
                if not torch.equal(first.view(torch.uint8), self._files[rank][place.short].view(torch.uint8)):
                    raise CheckpointError(
                        f"{self.folder}: {place.short} differs between rank 0 and rank {rank} -> convert it again"
                    )
            return first
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        axis = 0 if place.share == ROWS else 1
        for rank, part in zip(owners, whole.chunk(len(owners), axis)):
            part.copy_(self._files[rank][place.short])
        return whole

    def _owners(self, place: Place) -> list[int]:
        """The ranks that must hold a tensor: one for an expert, else all."""
        return [place.expert // self._experts_each] if place.share == EXPERTS else list(range(len(self._files)))

    def _put_together(self, place: Place) -> Spec:
        """Dtype and shape of the whole, once every rank holds its part and nobody else does."""
        owners = self._owners(place)
        holders = [rank for rank, held in enumerate(self._held) if place.short in held]
        if holders != owners:
            wrong = next(rank for rank in range(len(self._files)) if (rank in holders) != (rank in owners))
            has = "lacks" if wrong in owners else "must not hold"
            raise CheckpointError(f"{self._files[wrong].path} {has} {place.short} -> convert it again")
        specs = [self._files[rank].spec(place.short) for rank in owners]
        if len(set(specs)) > 1:
            other = next(rank for rank, spec in zip(owners, specs) if spec != specs[0])
            raise CheckpointError(
                f"{self.folder}: {place.short} is {specs[0].dtype} {specs[0].shape} on rank 0, {specs[other].dtype} "
                f"{specs[other].shape} on rank {other} -> all ranks must hold parts of one size"
            )
        if place.share in (WHOLE, EXPERTS):
            return specs[0]
        if len(specs[0].shape) != 2:
            raise CheckpointError(f"{self.folder}: {place.short} has shape {specs[0].shape} -> expected a matrix")
        rows, columns = specs[0].shape
        n = len(owners)
        return Spec(specs[0].dtype, (rows * n, columns) if place.share == ROWS else (rows, columns * n))


def _open(folder: Path) -> list[TensorFile]:
    """The files of ranks 0 to n - 1, which must all be there, and no others."""
    numbers = {number: path for path in rank_files(folder) if (number := _numbers(path)) is not None}
    sizes = sorted({n for _, n in numbers})
    if len(sizes) > 1:
        raise CheckpointError(f"{folder} holds files of mp{sizes[0]} and of mp{sizes[1]} -> keep one set of ranks")
    n = sizes[0]
    for rank, path in ((rank, path) for (rank, _), path in sorted(numbers.items()) if rank >= n):
        raise CheckpointError(f"{path} is rank {rank} of {n} -> ranks are 0 to {n - 1}")
    return [TensorFile(folder / f"model{rank}-mp{n}.safetensors") for rank in range(n)]
