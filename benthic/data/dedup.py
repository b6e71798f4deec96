"""Removes documents that are equal, or nearly equal, to another one.

Near duplicates: MinHash-LSH proposes pairs, the true Jaccard similarity of their word 5-grams decides, and connected
pairs form a cluster. Proposals alone would chain unrelated texts into giant clusters. One document of a cluster stays:
the longest, then the one with the smallest content hash, whatever the order of the input.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256

from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from benthic.base.errors import InputError
from benthic.data.documents import Document

NGRAM = 5  # words
SEED = 42
LARGEST = 10  # clusters reported
# Scripts without spaces count each character as a word; elsewhere two texts that differ by one character share nothing.
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")


@dataclass(frozen=True, kw_only=True)
class Deduplicated:
    """`documents` that stay, in input order; how many were removed; ids of the largest clusters, the kept one first."""

    documents: list[Document]
    removed: int
    largest: list[list[str]]


def exact(documents: Iterable[Document]) -> Deduplicated:
    """One document of each normalised text (Unicode NFC, runs of blanks equal)."""
    documents = list(documents)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, document in enumerate(documents):
        groups[content_hash(document.text)].append(i)
    return _keep_one(documents, list(groups.values()))


def near(documents: Iterable[Document], threshold: float = 0.8, num_perm: int = 128, bands: int = 16) -> Deduplicated:
    """One document of each cluster of pairs whose 5-gram Jaccard similarity is at least `threshold`.

    A pair of similarity s is proposed with probability 1 - (1 - s^r)^bands, r = num_perm / bands: 0.95 at 0.8 for the
    defaults. Documents without a single word are never duplicates.
    """
    if bands < 1 or num_perm % bands:
        raise InputError(f"num_perm={num_perm} must divide by bands={bands} -> use 128 and 16")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold} is no similarity -> use a number above 0, at most 1")
    documents = list(documents)
    grams = [ngrams(document.text) for document in documents]
    clusters = _Clusters(len(documents))
    firsts: dict[frozenset[bytes], int] = {}  # equal sets join at once, so that copies do not crowd the buckets
    for i, gram_set in enumerate(grams):
        if gram_set:
            clusters.join(i, firsts.setdefault(gram_set, i))
    for a, b in _proposals(firsts, num_perm, bands):
        if clusters.find(a) != clusters.find(b) and jaccard(grams[a], grams[b]) >= threshold:
            clusters.join(a, b)
    return _keep_one(documents, clusters.groups())


def content_hash(text: str) -> str:
    """sha256 of the normalised text."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()


def ngrams(text: str) -> frozenset[bytes]:
    """8-byte hashes of the word 5-grams; of all words together in a shorter text. Case and punctuation do not count."""
    words = _WORD.findall(unicodedata.normalize("NFC", text).casefold())
    starts = range(max(1, len(words) - NGRAM + 1)) if words else ()
    joined = (" ".join(words[start : start + NGRAM]).encode("utf-8", "surrogatepass") for start in starts)
    return frozenset(blake2b(gram, digest_size=8).digest() for gram in joined)


def jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    """Size of the intersection over size of the union; 0 for two empty sets."""
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0


def _proposals(documents: dict[frozenset[bytes], int], num_perm: int, bands: int) -> Iterator[tuple[int, int]]:
    """Pairs of documents with an equal band of MinHash values; a pair may come more than once."""
    rows = num_perm // bands
    buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for gram_set, i in documents.items():
        signature = RMinHash(num_perm=num_perm, seed=SEED)
        signature.update([gram.hex() for gram in gram_set])
        digest = signature.digest()
        for band in range(bands):
            buckets[(band, *digest[band * rows : (band + 1) * rows])].append(i)
    for members in buckets.values():
        for n, a in enumerate(members):
            for b in members[n + 1 :]:
                yield a, b


class _Clusters:
    """Union-find over 0..n-1."""

    def __init__(self, n: int):
        self._parent = list(range(n))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, a: int, b: int) -> None:
        self._parent[self.find(a)] = self.find(b)

    def groups(self) -> list[list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self._parent)):
            groups[self.find(i)].append(i)
        return list(groups.values())


def _keep_one(documents: list[Document], groups: list[list[int]]) -> Deduplicated:
    def preference(i: int) -> tuple[int, str, str]:
        return -len(documents[i].text), content_hash(documents[i].text), documents[i].id

    ranked = [sorted(group, key=preference) if len(group) > 1 else group for group in groups]
    kept = sorted(group[0] for group in ranked)
    clusters = [group for group in ranked if len(group) > 1]
    clusters.sort(key=lambda group: (-len(group), preference(group[0])))
    return Deduplicated(
        documents=[documents[i] for i in kept],
        removed=len(documents) - len(kept),
        largest=[[documents[i].id for i in group] for group in clusters[:LARGEST]],
    )
