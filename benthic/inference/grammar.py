"""Structured output: which tokens may come next so that the answer has the form that was asked for.

xgrammar (the extra `grammar`) compiles a JSON schema, a regular expression or an EBNF grammar into an automaton over
tokens. Compiling can take for ever, so it happens in a process of its own that is ended when its time is up. Matching
happens here, in integers, and is bounded by the processor time that a token may take.
"""

import contextlib
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from benthic.base.errors import BenthicError, InputError
from benthic.inference import schema
from benthic.inference.config import StructuredOutputsParams
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tool_calls import MARKS

NO_TEXT = b"\xff"  # what no text in UTF-8 has: so a token is allowed only where a form names its id
WORKER = str(Path(__file__).with_name("grammar_worker.py"))
THINK_END = "</think>"
CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")  # JSON has them nowhere, or a tab between values, at most
MISSING = "structured_outputs needs xgrammar, which is not installed -> pip install 'benthic[grammar]'"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one form may cost. Everything is checked before it is spent, or ended when it is."""

    characters: int = 65536
    """Of a schema or grammar."""
    tag_characters: int = 262144
    """Of a structural tag, which holds many schemas."""
    regex_characters: int = 4096
    schema_depth: int = 32
    schema_parts: int = 2048
    compile_seconds: float = 1.0
    tag_seconds: float = 2.0
    """The same for a structural tag."""
    compile_bytes: int = 2**31
    """Memory that the compiling process may take on top of what it starts with."""
    start_seconds: float = 120.0
    """For the compiling process to start, once."""
    cache_bytes: int = 2**28
    """Of all compiled forms that are kept."""
    token_seconds: float = 0.25
    """Processor time to advance by one token, or to find the allowed ones."""


LIMITS = Limits()


class Grammars:
    """Forms of answers for one tokenizer. `compile` may be called from any thread; the last used forms are kept."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: Limits = LIMITS):
        self._xgrammar = _import()
        self.limits, self.vocab_size, self.eos_id = limits, vocab_size, tokenizer.eos_id
        self.think_end = tokenizer.special.get(THINK_END)
        vocab = [tokenizer.bytes_of(id) for id in range(min(vocab_size, tokenizer.vocab_size))]
        for name, id in tokenizer.special.items():  # text does not write them: without bytes a token is never allowed
            if id < len(vocab):
                vocab[id] = NO_TEXT + vocab[id] if name in MARKS else b""
        self._info = self._xgrammar.TokenizerInfo(
            vocab, self._xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=[self.eos_id]
        )
        self._json_tokens = _packed([not CONTROL.search(token) for token in vocab], vocab_size)
        self._compiler = _Compiler(vocab, vocab_size, self.eos_id, limits)
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()  # compiled, or the text of the error
        self._kept_bytes = 0
        self._lock = threading.Lock()  # of what is kept, never for long
        self._compiling = threading.Lock()

    def matcher(self, params: StructuredOutputsParams) -> "Matcher":
        """The state of one answer at its beginning. InputError for a form that cannot be used."""
        if params.after_thinking and self.think_end is None:
            raise InputError(f"after_thinking=True, but the tokenizer has no {THINK_END} -> use after_thinking=False")
        compiled = self.compile(params)
        return Matcher(
            self._xgrammar.GrammarMatcher(compiled),
            self._json_tokens if params.form[0] in ("json", "structural_tag") else None,
            self.eos_id,
            self.think_end if params.after_thinking else None,
            self.limits.token_seconds,
        )

    def compile(self, params: StructuredOutputsParams) -> Any:
        """The compiled form, from the cache if it is there. A form that failed fails again at no cost."""
        self._check(*params.form)
        known = self._find(params.form)
        if known is None:
            with self._compiling:
                known = self._find(params.form) or self._compiled(params.form)  # another thread may have been first
        if isinstance(known, str):
            raise InputError(known)
        return known

    def _find(self, form: tuple[str, str]) -> Any:
        with self._lock:
            if form in self._kept:
                self._kept.move_to_end(form)
            return self._kept.get(form)

    def _compiled(self, form: tuple[str, str]) -> Any:
        try:
            made = self._xgrammar.CompiledGrammar.deserialize_json(self._compiler(*form), self._info)
        except InputError as error:
            made = str(error)
        with self._lock:
            self._keep(form, made)
        return made

    def close(self) -> None:
        """End the compiling process."""
        with self._compiling:
            self._compiler.close()

    def _check(self, kind: str, text: str) -> None:
        bounds = {"regex": self.limits.regex_characters, "structural_tag": self.limits.tag_characters}
        most = bounds.get(kind, self.limits.characters)
        if len(text) > most:
            raise InputError(f"{kind} has {len(text)} characters -> give at most {most}")
        if kind == "json":
            schema.check(text, self.limits.schema_depth, self.limits.schema_parts)
        elif kind == "structural_tag":
            schema.check_tag(text, self.limits.schema_depth, self.limits.schema_parts)

    def _keep(self, form: tuple[str, str], value: Any) -> None:
        self._kept[form] = value
        self._kept_bytes += _size(form, value)
        while len(self._kept) > 1 and self._kept_bytes > self.limits.cache_bytes:
            self._kept_bytes -= _size(*self._kept.popitem(last=False))


class Matcher:
    """Where one answer stands in its form. Preemption changes nothing: it follows tokens, not latents."""

    def __init__(self, matcher: Any, tokens: Tensor | None, eos_id: int, think_end: int | None, seconds: float):
        """`tokens` [ceil(V / 32)] are the only ones that any place of the form allows; None: that is up to the form."""
        self._matcher, self._tokens, self._eos_id = matcher, tokens, eos_id
        self._think_end, self._seconds = think_end, seconds
        self.slow = False  # some token took too long: the form explodes, and the request should be ended

    def accept(self, ids: Sequence[int]) -> None:
        """Advance by the tokens of the answer. Tokens that the form forbids are an error of the caller."""
        begin = time.thread_time()
        for id in ids:
            if self._think_end is not None:
                self._think_end = None if id == self._think_end else self._think_end
            elif not self._matcher.accept_token(id):
                raise BenthicError(
                    f"token {id} does not fit the form of its answer -> apply the bitmask before choosing"
                )
        self.slow |= time.thread_time() - begin > self._seconds * max(1, len(ids))

    def fill(self, row: Tensor) -> None:
        """Write the allowed tokens to row [1, ceil(V / 32)] int32. Until the thinking has ended everything may come but
        the end, so that an answer that ends has its form."""
        if self._think_end is not None:
            row.fill_(-1)
            row[0, self._eos_id // 32] = _without(self._eos_id % 32)
        elif self._matcher.is_terminated():  # a step too many, which nobody reads
            row.fill_(-1)
        else:
            begin = time.thread_time()
            self._matcher.fill_next_token_bitmask(row)
            if self._tokens is not None:
                row &= self._tokens
            self.slow |= time.thread_time() - begin > self._seconds


def bitmask(matchers: Sequence[Matcher], vocab_size: int) -> Tensor:
    """[rows, ceil(V / 32)] int32 on the host, one row per matcher: what `sampler.choose` takes."""
    rows = torch.full((len(matchers), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for i, matcher in enumerate(matchers):
        matcher.fill(rows[i : i + 1])
    return rows


class _Compiler:
    """The compiling process, started at once and again after each end."""

    def __init__(self, vocab: list[bytes], vocab_size: int, eos_id: int, limits: Limits):
        self._limits = limits
        self._head = {
            "vocab": [token.decode("latin-1") for token in vocab],
            "vocab_size": vocab_size,
            "stop_token_ids": [eos_id],
            "threads": min(8, os.cpu_count() or 1),
            "bytes": limits.compile_bytes,
            "seconds": math.ceil(2 * max(limits.compile_seconds, limits.tag_seconds)) + 1,
        }
        self._start()

    def __call__(self, kind: str, text: str) -> str:
        """The compiled form, serialised. InputError with the reason where there is none in time."""
        if not self._ready and self._answer(self._limits.start_seconds) is None:
            self.close()
            raise BenthicError(
                "the process that compiles grammars does not start -> check the installation of xgrammar"
            )
        self._ready = True
        seconds = self._limits.tag_seconds if kind == "structural_tag" else self._limits.compile_seconds
        answer = self._answer(seconds, [kind, text])
        if answer is None:
            self.close()
            self._start()
            raise InputError(
                f"{kind}={text!r:.40} takes more than {seconds:g} s or too much memory to compile "
                "-> give a simpler one, with smaller bounds on repetitions and lengths"
            )
        if "error" in answer:
            raise InputError(f"{kind}={text!r:.40} cannot be used ({answer['error']}) -> correct it")
        return answer["grammar"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _start(self) -> None:
        self._ready = False
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._reader = threading.Thread(target=_converse, args=(self._process, self._head, self._lines), daemon=True)
        self._reader.start()

    def _answer(self, seconds: float, question: object = None) -> dict[str, str] | None:
        """The next line, None where none comes in time or the process has ended."""
        try:
            if question is not None:
                _write(self._process, question)
            line = self._lines.get(timeout=seconds)
        except (queue.Empty, BrokenPipeError):
            return None
        return json.loads(line) if line else None


def _converse(process: subprocess.Popen, head: object, lines: "queue.SimpleQueue[bytes]") -> None:
    """Send the head, which waits for the process to have started, and take every line and an empty one at the end."""
    with contextlib.suppress(BrokenPipeError):  # it has ended, and so do its lines
        _write(process, head)
    with _pipe(process.stdout) as stdout:
        for line in stdout:
            lines.put(line)
    lines.put(b"")


def _write(process: subprocess.Popen, message: object) -> None:
    stdin = _pipe(process.stdin)
    stdin.write(json.dumps(message).encode() + b"\n")
    stdin.flush()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the compiling process was started without pipes")
    return stream


def _size(form: tuple[str, str], value: Any) -> int:
    return len(form[1]) + (len(value) if isinstance(value, str) else value.memory_size_bytes)


def _packed(allowed: list[bool], vocab_size: int) -> Tensor:
    """One bit per token as in a bitmask."""
    bits = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    bits[: len(allowed)] = torch.tensor(allowed, dtype=torch.int64)
    words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    return words.to(torch.int32)


def _without(bit: int) -> int:
    """All 32 bits but one, as int32."""
    return ~(1 << bit) if bit < 31 else 2**31 - 1


def _import() -> Any:
    try:
        import xgrammar  # an extra, and slow to import
    except ImportError as error:
        raise InputError(MISSING) from error
    return xgrammar
