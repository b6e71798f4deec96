"""The tokenizer: a folder with tokenizer.json in, ids and text out."""

import copy
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from benthic.base import files
from benthic.base.errors import InputError, did_you_mean
from benthic.tokenizer import templates, tokens
from benthic.tokenizer.encoder import FastEncoder, PlainEncoder, whole_characters
from benthic.tokenizer.vocabulary import Vocabulary

VOCABULARY = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # where newer tools keep the template; it goes before that of the config
CHECKSUMS = "tokenizer_checksums.json"  # written last; folders made by other tools have none


class Tokenizer:
    """Byte-level BPE with DeepSeek's added tokens. Immutable, and safe to use from several threads.

    `spec` is the content of tokenizer.json, `config` of tokenizer_config.json, `where` names them in errors.
    `template` is the name of its chat format, None where `chat_template` is Jinja text that writes none of those known.
    `released_compat` makes `encode` find added tokens in text, as other tools do with the released files: a message can
    then forge turns, and with V1 and V2 files "für" does not survive, because these match the letter as a byte.
    """

    def __init__(
        self, spec: dict[str, Any], config: dict[str, Any], where: str = VOCABULARY, released_compat: bool = False
    ):
        vocabulary = Vocabulary.parse(spec, where)
        self._spec, self._config, self._where, self._released_compat = spec, config, where, released_compat
        self.chat_template: str = _chat_template(config.get("chat_template"), where)
        self._bytes, self._skipped = vocabulary.bytes_by_id, vocabulary.control_ids
        self.special: dict[str, int] = vocabulary.added
        self.template = templates.named(self.chat_template) if self.chat_template else templates.fitting(self.special)
        self.vocab_size: int = len(vocabulary.bytes_by_id)
        self.bos_id: int = self.id_of(_name(config, "bos_token", where))
        self.eos_id: int = self.id_of(_name(config, "eos_token", where))
        self.pad_id: int = self.id_of(_name(config, "pad_token", where))
        ranks = None if released_compat else vocabulary.ranks()
        self._encoder = PlainEncoder(spec, where, released_compat) if ranks is None else FastEncoder(ranks, spec, where)

    @classmethod
    def load(cls, folder: Path | str, released_compat: bool = False) -> Self:
        """Read a folder with tokenizer.json and tokenizer_config.json. InputError names the file that is at fault."""
        folder = Path(folder)
        data = {name: _read(folder / name) for name in (VOCABULARY, CONFIG)}
        if (folder / CHECKSUMS).exists():
            expected = _parse(_read(folder / CHECKSUMS), folder / CHECKSUMS)
            for name in data:
                if sha256(data[name]).hexdigest() != expected.get(name):
                    raise InputError(
                        f"{folder / name} does not match {CHECKSUMS} -> restore the file, "
                        f"or delete {CHECKSUMS} if you edited it on purpose"
                    )
        spec, config = (_parse(data[name], folder / name) for name in (VOCABULARY, CONFIG))
        if (folder / TEMPLATE).exists():
            config["chat_template"] = _read(folder / TEMPLATE).decode("utf-8", "replace")
        return cls(spec, config, str(folder / VOCABULARY), released_compat)

    def with_template(self, choice: Path | str) -> Self:
        """The same tokenizer with another chat format: a name in `templates.TEMPLATES`, or the path of a Jinja file.

        It is chosen once, where a model is loaded; `save` writes it. `chat.check` says whether it can be used.
        """
        name, known = str(choice), templates.TEMPLATES.get(str(choice))
        text = templates.jinja(known) if known else _template_file(name)
        other = copy.copy(self)
        other._config = self._config | {"chat_template": text}
        other.chat_template, other.template = text, name if known else templates.named(text)
        return other

    def save(self, folder: Path | str) -> None:
        """Write the files that `load`, the tokenizers library and transformers read; each is whole or absent."""
        folder = Path(folder)
        data = {VOCABULARY: files.json_bytes(self._spec), CONFIG: files.json_bytes(self._config)}
        files.make_folder(folder)
        for name, content in data.items():
            files.write_atomic(folder / name, content)
        files.write_json(folder / CHECKSUMS, {name: sha256(content).hexdigest() for name, content in data.items()})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS. An added token's name in it is only text; lone surrogates become U+FFFD."""
        return self._encoder.encode(whole_characters(text))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on `threads` threads (both engines release the interpreter lock)."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out the control tokens (BOS, EOS, padding); chat and thinking tokens stay, as in
        transformers.
        """
        return self.bytes_of_all(ids, skip_special).decode("utf-8", "replace")

    def bytes_of_all(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes of several ids, joined."""
        return b"".join(self.bytes_of(i) for i in ids if not (skip_special and i in self._skipped))

    def bytes_of(self, id: int) -> bytes:
        """The bytes that one id stands for; of an added token, its name."""
        if not 0 <= id < self.vocab_size:
            raise InputError(f"id {id} is outside the tokenizer's vocabulary of {self.vocab_size} -> use a smaller id")
        return self._bytes[id]

    def id_of(self, token: str) -> int:
        """The id of an added token."""
        if token not in self.special:
            known = [name for name in self.special if "place▁holder" not in name]
            raise InputError(f"unknown token {token!r} in the tokenizer -> use one it has{did_you_mean(token, known)}")
        return self.special[token]


def config_of_new_tokenizer(template: str) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer that we trained, with a chat format by its name."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens.BOS,
        "eos_token": tokens.EOS,
        "pad_token": tokens.PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": templates.jinja(templates.TEMPLATES[template]),
    }


def _name(config: dict[str, Any], key: str, where: str) -> str:
    """A token's name: a string, or an object with `content` as older files write it."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise InputError(f"{key} is {value!r} in {CONFIG} beside {where} -> give the name of a token")
    return name


def _chat_template(value: Any, where: str) -> str:
    """The Jinja text: a string, or the one named "default" in a list of names and texts; empty where there is none."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}.get("default")
    if not isinstance(value, str | None):
        raise InputError(f"chat_template is a {type(value).__name__} in {CONFIG} beside {where} -> give a string")
    return value or ""


def _template_file(name: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"unknown template {name!r}, and no such file -> use a known one or the path of a Jinja file"
            + did_you_mean(name, templates.TEMPLATES)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the template {name} ({error}) -> give a Jinja file in UTF-8") from error
    if not text:
        raise InputError(f"the template {name} is empty -> give a Jinja file")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror} -> give a folder with {VOCABULARY}, {CONFIG}"
        ) from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}) -> restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__} -> it must be a JSON object")
    return value
