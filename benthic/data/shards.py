"""Tokenised documents on disk: .bin files of fixed-width ids, an index, and a manifest with checksums.

A folder is sealed: it appears whole, and `Shards.open` refuses one byte of difference.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from benthic.base import files
from benthic.base.errors import InputError

INDEX = "index.json"
OFFSETS = "documents.bin"  # uint64 little-endian: start of each document in tokens, then the number of tokens
SHARD_TOKENS = 100_000_000


def write(
    folder: Path | str, token_arrays: Iterable[list[int]], vocab_size: int, shard_tokens: int = SHARD_TOKENS
) -> "Shards":
    """Write documents of ids to a new folder; a shard ends with the document that reaches `shard_tokens`.

    Ids take two bytes up to a vocabulary of 65,536, else four. InputError for an id outside the vocabulary, for no
    token at all, and for a folder that exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"output folder {folder} exists -> delete it or choose another")
    partial = folder.with_name(files.PARTIAL + folder.name)
    if partial.exists():
        files.remove_folder(partial)
    files.make_folder(partial)
    writer = _Writer(iter(token_arrays), vocab_size)
    digests, tokens = {}, []
    while not writer.finished:
        name, start = f"shard-{len(tokens):05d}.bin", writer.offsets[-1]
        digests[name] = files.write_file(partial / name, writer.documents(shard_tokens))
        tokens.append(writer.offsets[-1] - start)
    if not writer.offsets[-1]:
        raise InputError(f"no token to write to {folder} -> give at least one document with text")
    offsets = np.asarray(writer.offsets, dtype="<u8")
    index = {
        "dtype": writer.dtype.name,
        "vocab_size": vocab_size,
        "documents": len(offsets) - 1,
        "shards": [{"file": name, "tokens": n, "sha256": sha} for (name, sha), n in zip(digests.items(), tokens)],
    }
    digests[OFFSETS] = files.write_file(partial / OFFSETS, [offsets.tobytes()])
    digests[INDEX] = files.write_file(partial / INDEX, [files.json_bytes(index)])
    files.commit_folder(partial, folder, digests)
    return Shards.open(folder)


class _Writer:
    """Turns documents into bytes, and remembers where each began."""

    def __init__(self, token_arrays: Iterator[list[int]], vocab_size: int):
        self._token_arrays, self._vocab_size = token_arrays, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.offsets = array("Q", [0])
        self._next = next(token_arrays, None)

    @property
    def finished(self) -> bool:
        return self._next is None

    def documents(self, shard_tokens: int) -> Iterator[bytes]:
        """Bytes of the next documents, until a shard is full or there are no more."""
        end = self.offsets[-1] + shard_tokens
        while self.offsets[-1] < end and self._next is not None:
            ids, self._next = self._next, next(self._token_arrays, None)
            wide = np.asarray(ids, dtype=np.int64)
            if len(wide) and not 0 <= wide.min() <= wide.max() < self._vocab_size:
                bad = next(i for i in ids if not 0 <= i < self._vocab_size)
                raise InputError(
                    f"id {bad} in document {len(self.offsets) - 1} is outside vocab_size={self._vocab_size} "
                    "-> use the tokenizer that made the ids"
                )
            self.offsets.append(self.offsets[-1] + len(wide))
            yield wide.astype(self.dtype).tobytes()


class Shards:
    """A sealed folder of tokens, seen as one array. Memory-mapped: opening reads every byte once, using it few."""

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.vocab_size: int = index["vocab_size"]
        self.identity: str = files.sha256_file(folder / files.MANIFEST)  # equal for equal data, and only then
        self._offsets = np.fromfile(folder / OFFSETS, dtype="<u8").astype(np.int64)
        names = [entry["file"] for entry in index["shards"] if entry["tokens"]]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._arrays = [np.memmap(folder / name, dtype=dtype, mode="r") for name in names]
        self._starts = np.cumsum([0, *(len(tokens) for tokens in self._arrays)])
        self.num_tokens: int = int(self._starts[-1])

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Check every file against its checksum and map it. CheckpointError names the first file that is damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"token folder {folder} does not exist -> tokenize the data first")
        files.verify_folder(folder)
        return cls(folder, json.loads((folder / INDEX).read_bytes()))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the whole, across shards, as a new int64 array."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise InputError(f"tokens {start} to {stop} are outside 0 to {self.num_tokens} -> read less")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for tokens, offset in zip(self._arrays[first:], self._starts[first:]):
            if offset >= stop:
                break
            pieces.append(tokens[max(0, start - offset) : stop - offset].astype(np.int64))
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """Each document's tokens, in the order they were written."""
        for start, stop in zip(self._offsets[:-1], self._offsets[1:], strict=True):
            yield self.read(int(start), int(stop))
