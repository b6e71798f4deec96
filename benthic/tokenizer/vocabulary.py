"""Reads and checks the content of a tokenizer.json before anything is built from it."""

import itertools
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeVar

from benthic.base.errors import InputError
from benthic.tokenizer import pretokenizer

T = TypeVar("T")


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte: visible Latin-1 is itself, the rest counts from U+0100 up."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """bytes_by_id: what each id stands for; added: {name: id}; control_ids: the added tokens marked special.

    The files of V1 and V2 list the 13 bytes that never occur in UTF-8 as added tokens, by their letters in the byte
    alphabet (U+00FC for 0xFC). Here they are what they stand for: bytes of the vocabulary, not names to be found.
    """

    bytes_by_id: list[bytes]
    added: dict[str, int]
    control_ids: frozenset[int]
    merged: list[bytes]  # result of each merge, in merge order
    as_v3: bool  # cuts and merges text by V3's rules, which are those of `FastEncoder`

    @classmethod
    def parse(cls, spec: dict[str, Any], where: str) -> Self:
        """Check `spec`. InputError at the first thing that is not a byte-level BPE with ids 0 to n-1."""
        model = _typed(spec.get("model"), dict, "model", where)
        if model.get("type") != "BPE":
            _refuse(f"model.type is {model.get('type')!r}", where)
        vocab = _typed(model.get("vocab"), dict, "model.vocab", where)
        merges = _typed(model.get("merges"), list, "model.merges", where)
        added, control_ids = _added(_typed(spec.get("added_tokens"), list, "added_tokens", where), where)
        letters = {name: i for name, i in added.items() if name in byte_alphabet() and name not in vocab}
        vocab, added = {**vocab, **letters}, {name: i for name, i in added.items() if name not in letters}
        return cls(
            bytes_by_id=_bytes_by_id(vocab, added, where),
            added=added,
            control_ids=control_ids,
            merged=_merged(merges, {name for name in vocab if name not in added}, where),
            as_v3=_is_v3(spec, model),
        )

    def ranks(self) -> dict[bytes, int] | None:
        """{bytes: id} for an engine in which the smaller id merges first; None where ids or rules are not like that."""
        added = set(self.added.values())
        in_text = {data: i for i, data in enumerate(self.bytes_by_id) if i not in added}
        order = [in_text[data] for data in self.merged]
        complete = all(bytes([byte]) in in_text for byte in range(256)) and len(in_text) == 256 + len(order)
        return in_text if self.as_v3 and complete and all(a < b for a, b in itertools.pairwise(order)) else None


def _refuse(problem: str, where: str) -> NoReturn:
    raise InputError(f"{problem} in {where} -> use the tokenizer.json of a byte-level BPE tokenizer")


def _typed(value: Any, kind: type[T], name: str, where: str) -> T:
    if not isinstance(value, kind):
        _refuse(f"{name} is a {type(value).__name__}, not a {kind.__name__},", where)
    return value


def _added(entries: list[Any], where: str) -> tuple[dict[str, int], frozenset[int]]:
    added: dict[str, int] = {}
    control_ids = set()
    for entry in entries:
        entry = _typed(entry, dict, "an added token", where)
        name = _typed(entry.get("content"), str, "the content of an added token", where)
        if not name or name in added:
            _refuse(f"added token {name!r} is empty or there twice", where)
        added[name] = _typed(entry.get("id"), int, f"the id of {name!r}", where)
        if entry.get("special"):
            control_ids.add(added[name])
    return added, frozenset(control_ids)


def _bytes_by_id(vocab: dict[str, Any], added: dict[str, int], where: str) -> list[bytes]:
    ids = {**vocab, **added}
    if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        _refuse(f"the ids of {len(ids)} tokens are not 0 to {len(ids) - 1}", where)
    alphabet = byte_alphabet()
    data = [b""] * len(ids)
    for name, i in ids.items():
        if name in added:
            data[i] = name.encode("utf-8", "replace")
        elif name and all(char in alphabet for char in name):
            data[i] = bytes(alphabet[char] for char in name)
        else:
            _refuse(f"token {name!r} is not written in the byte alphabet", where)
    return data


def _merged(merges: list[Any], names: set[str], where: str) -> list[bytes]:
    """The bytes that each merge makes. A merge is ["a", "b"] or, in older files, "a b"."""
    alphabet = byte_alphabet()
    merged = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        whole = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not whole or not {*pair, "".join(pair)} <= names:
            _refuse(f"merge {merge!r} is not a pair of tokens that makes a token", where)
        merged.append(bytes(alphabet[char] for char in "".join(pair)))
    return merged


def _is_v3(spec: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether text is left as it is, cut as in V3 and merged by the merge list alone."""
    unchanged = spec.get("normalizer") in (None, {"type": "Sequence", "normalizers": []})
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return unchanged and spec.get("pre_tokenizer") == pretokenizer.V3 and not any(model.get(key) for key in options)
