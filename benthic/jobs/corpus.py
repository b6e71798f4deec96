"""From files to what pretraining reads: deduplicated, filtered, split by document, tokenised, packed into shards."""

import gzip
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benthic.base.errors import InputError
from benthic.base.files import remove_folder
from benthic.base.log import Run
from benthic.data import dedup, quality, shards, sources, split
from benthic.data.documents import Document, Skips
from benthic.recipes.demo import CorpusConfig
from benthic.tokenizer import bpe
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
PHASES = 6
SHARDS = ("train", "heldout")


def build(folder: Path, config: CorpusConfig, vocab_size: int, seed: int, run: Run) -> dict[str, Any]:
    """Write `folder`/tokenizer, /train and /heldout; returns the funnel in numbers."""
    for name in SHARDS:  # sealed by a process that was stopped before it could say that the stage is done
        if (folder / name).exists():
            remove_folder(folder / name)
    with run.progress("corpus", PHASES) as progress:
        skips = Skips()
        found = sources.read(config.paths, skips) if config.paths else sources.standard_library(skips)
        documents = list(_within(found, config.max_bytes))
        progress.update(1)
        read, size = len(documents), _bytes(documents)
        exact = dedup.exact(documents)
        near = dedup.near(exact.documents, threshold=config.near_duplicate_threshold)
        progress.update(2)
        verdicts = [quality.rejected_by(document) for document in near.documents]
        documents = [document for document, rule in zip(near.documents, verdicts) if rule is None]
        progress.update(3)
        held_out = [d for d in documents if split.is_held_out(d, config.held_out_share, seed)]
        train = [d for d in documents if not split.is_held_out(d, config.held_out_share, seed)]
        if not train or not held_out:
            raise InputError(
                f"the corpus has {len(train)} documents to train on and {len(held_out)} held out after cleaning "
                f"(of {read} read) -> give more text, or another held_out_share"
            )
        tokenizer = bpe.train((d.text for d in train), vocab_size)
        tokenizer.save(folder / "tokenizer")
        progress.update(4)
        train_shards = _tokenise(folder / "train", train, tokenizer)
        progress.update(5)
        held_out_shards = _tokenise(folder / "heldout", held_out, tokenizer)
        progress.update(6)
    return {
        "documents": read,
        "bytes": size,
        "exact_duplicates": exact.removed,
        "near_duplicates": near.removed,
        "rejected": dict(sorted(Counter(rule for rule in verdicts if rule is not None).items())),
        "skipped": [{"path": path, "reason": reason} for path, reason in skips.listed],
        "train_documents": len(train),
        "train_bytes": _bytes(train),
        "train_tokens": train_shards.num_tokens,
        "heldout_documents": len(held_out),
        "heldout_bytes": _bytes(held_out),
        "heldout_tokens": held_out_shards.num_tokens,
        "gzip_bits_per_byte": 8 * _gzip(b"\n".join(d.text.encode() for d in held_out)) / _bytes(held_out),
        "gzip_per_document_bits_per_byte": 8 * sum(_gzip(d.text.encode()) for d in held_out) / _bytes(held_out),
    }


def _within(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """Documents until their total size reaches `max_bytes`; all of them with 0."""
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if max_bytes and total > max_bytes:
            log.warning("corpus: stopped reading at max_bytes=%s, before %s", f"{max_bytes:,}", document.id)
            return
        yield document


def _tokenise(folder: Path, documents: list[Document], tokenizer: Tokenizer) -> shards.Shards:
    """One stream: begin-of-sentence, text, end-of-sentence for each document."""
    encoded = (tokenizer.encode_batch([d.text for d in some]) for some in _groups(documents, 256))
    flat = itertools.chain.from_iterable(encoded)
    return shards.write(folder, ([tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in flat), tokenizer.vocab_size)


def _groups(documents: list[Document], size: int) -> Iterator[list[Document]]:
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _bytes(documents: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def _gzip(data: bytes) -> int:
    return len(gzip.compress(data, 9, mtime=0))
