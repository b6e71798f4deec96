"""Model folders out: weights piece by piece into shards, `config.json`, tokenizer files, one seal over all of it."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benthic.base.errors import BenthicError, InputError
from benthic.base.files import (
    MANIFEST,
    PARTIAL,
    commit_folder,
    json_bytes,
    make_folder,
    remove_folder,
    sha256_file,
    write_file,
)
from benthic.base.tensors import Spec, check_finite, write_stream
from benthic.kernels.quant import BLOCK, quantise_blocks
from benthic.model.linear import FP8, SCALE
from benthic.model.weights import INDEX, WEIGHTS

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One weight as it will lie in the file: its tensors' types, known beforehand, and the call that makes them."""

    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(spec.nbytes for spec in self.specs.values())


def plain(name: str, spec: Spec, make: Callable[[], Tensor]) -> Piece:
    """A weight that is one tensor."""
    return Piece(specs={name: spec}, make=lambda: {name: make()})


def in_blocks(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Piece:
    """A matrix that becomes FP8 blocks and their factors."""
    factors = tuple(-(-n // BLOCK) for n in shape)
    specs = {name: Spec(FP8, shape), name + SCALE: Spec(torch.float32, factors)}
    return Piece(specs=specs, make=lambda: dict(zip(specs, quantise_blocks(make()))))


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the released V3 files hold this weight as FP8: projections do; embedding, head, gate, eh_proj do not."""
    return len(shape) == 2 and bool(re.search(r"_proj(_with_mqa)?\.weight$", name)) and "eh_proj" not in name


def write_folder(
    folder: Path,
    pieces: Mapping[str, Piece],
    config: Mapping[str, Any],
    add_files: Callable[[Path], None],
    shard_bytes: int,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> dict[str, str]:
    """Write a sealed model folder at `folder`, which must not exist: everything or nothing appears.

    Each piece is made when its turn comes and dropped when it is written; `on_bytes` hears of its size. `add_files`
    puts more files into the folder that it is given. Returns the sha256 of each of the folder's files.
    """
    if folder.exists():
        raise InputError(f"model folder {folder} already exists -> choose another, or remove it first")
    partial = folder.with_name(PARTIAL + folder.name)
    if partial.exists():  # left by a process that was stopped while writing
        remove_folder(partial)
    make_folder(partial)
    try:
        digests = _write_weights(partial, pieces, shard_bytes, on_bytes)
        digests[CONFIG] = write_file(partial / CONFIG, [json_bytes(config)])
        add_files(partial)
        digests |= {path.name: sha256_file(path) for path in partial.iterdir() if path.name not in digests}
        commit_folder(partial, folder, digests)
    except BenthicError:
        with contextlib.suppress(BenthicError):  # the first error is the one to read
            remove_folder(partial)
        raise
    return digests | {MANIFEST: sha256_file(folder / MANIFEST)}


def _write_weights(
    folder: Path, pieces: Mapping[str, Piece], shard_bytes: int, on_bytes: Callable[[int], None]
) -> dict[str, str]:
    """One file, or shards filled in order of the names, with an index."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for _, piece in sorted(pieces.items()):
        if filled + piece.nbytes > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    digests, held = {}, {}
    for file, shard in zip(files, shards):
        specs = {name: spec for piece in shard for name, spec in piece.specs.items()}
        digests[file] = write_stream(folder / file, specs, _made(shard, folder / file, on_bytes))
        held |= dict.fromkeys(specs, file)
    if len(shards) > 1:
        total = sum(piece.nbytes for piece in pieces.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))}
        digests[INDEX] = write_file(folder / INDEX, [json_bytes(index)])
    return digests


def _made(shard: list[Piece], path: Path, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    for piece in shard:
        for name, tensor in piece.make().items():
            check_finite(name, tensor, path)
            yield name, tensor
            del tensor  # before the next is made
        on_bytes(piece.nbytes)
