"""What an engine may use and how one request is sampled. Names are vLLM's. Imports no torch."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from benthic.base.errors import InputError

MAX_SAMPLES = 16384  # most samples of one request
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. Every number is checked before memory is taken."""

    max_num_seqs: int = 256
    """Most requests that run at once; the others wait in order of arrival."""
    max_num_batched_tokens: int = 8192
    """Most tokens of one step, decode rows and chunks of prompts together. Where it is small, fewer requests than
    max_num_seqs run at once, so that a quarter of it is left for prompts."""
    max_model_len: int = 0
    """Longest prompt and answer together; 0 takes the model's max_position_embeddings."""
    num_speculative_tokens: int = 0
    """Tokens drafted per step by the first multi-token prediction module: 0 or 1. Greedy requests only."""
    page_size: int = 16
    """Tokens per cache page."""
    enable_prefix_caching: bool = True
    """Keep computed pages for later prompts that begin with the same tokens, until their room is needed."""
    num_pages: int = 0
    """Cache pages; 0 takes enough for max_num_seqs requests of max_model_len tokens."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
            _integer(name, getattr(self, name), 1, MAX_INTEGER)
        for name in ("max_model_len", "num_pages"):
            _integer(name, getattr(self, name), 0, MAX_INTEGER)
        _integer("num_speculative_tokens", self.num_speculative_tokens, 0, 1)

    def resolve(self, max_position_embeddings: int, num_nextn_predict_layers: int) -> Self:
        """Fill in the zeros for a model and refuse what it cannot do."""
        length = self.max_model_len or max_position_embeddings
        _integer("max_model_len", length, 2, max_position_embeddings)
        _integer("num_speculative_tokens", self.num_speculative_tokens, 0, num_nextn_predict_layers)
        longest = -(-length // self.page_size)
        pages = self.num_pages or self.max_num_seqs * longest
        if pages < longest:
            raise InputError(
                f"num_pages={pages} holds less than one request of max_model_len={length} -> use {longest} or more"
            )
        return replace(self, max_model_len=length, num_pages=pages)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Order: temperature, then top_k, then top_p of what is left."""

    max_tokens: int = 16
    """Most tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability mass, the one that crosses it included."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int = 0
    """Seed of the request's own random numbers: the same seed and prompt give the same answer in any company."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these (or with the tokenizer's end of sentence); the token is part of the answer."""
    n: int = 1
    """Samples of the prompt, see `samples`."""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, MAX_INTEGER)
        _number("temperature", self.temperature)
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature} is negative -> use 0 (greedy) or more")
        _number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is out of bounds -> use a number above 0 and up to 1")
        _integer("top_k", self.top_k, 0, MAX_INTEGER)
        _integer("seed", self.seed, 0, 2**63 - 1)
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Iterable):
            raise InputError(f"stop_token_ids={self.stop_token_ids!r} is no list -> give a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, MAX_INTEGER)
        _integer("n", self.n, 1, MAX_SAMPLES)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def samples(self) -> list[Self]:
        """One SamplingParams with n=1 per sample. Sample 0 keeps the seed; sample k gets `sample_seed(seed, k)`."""
        return [replace(self, n=1, seed=sample_seed(self.seed, k)) for k in range(self.n)]


def sample_seed(seed: int, k: int) -> int:
    """Seed of sample k: `seed` itself for k = 0, else the first 63 bits of BLAKE2b of the text "seed:k"."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{k}".encode(), digest_size=8).digest(), "big") >> 1


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name}={value!r} is out of bounds -> use a whole number from {low} to {high}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} is not a finite number -> use a finite number")
