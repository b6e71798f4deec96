"""What an engine may use and how one request is sampled. Names are vLLM's. Imports no torch."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from benthic.base.errors import InputError

MAX_DRAFTS = 8  # tokens drafted per step and request
MAX_SAMPLES = 16384  # most samples of one request
MAX_INTEGER = 2**31 - 1
MAX_LOGPROBS = 20  # most alternatives reported per token
MAX_BIASES = 1024  # most tokens with a bias of their own
MAX_BIAS = 100.0  # of one logit
MAX_STOPS = 64  # most stop strings, and most stop tokens
MAX_STOP_CHARACTERS = 1024  # of one stop string


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
    """Tokens drafted per step and request by the first multi-token prediction module, each from the one before: 0 to
    8. Answers are those without."""
    adaptive_speculation: bool = True
    """Stop drafting while it does not pay, by measured times and accepted drafts, and try again now and then."""
    page_size: int = 64
    """Tokens per cache page. The kernels are fastest with 64."""
    enable_prefix_caching: bool = True
    """Keep computed pages for later prompts that begin with the same tokens, until their room is needed."""
    kv_cache_dtype: Literal["auto", "fp8", "int6"] = "auto"
    """How latents are kept: as computed, in 8 bits, or in 6."""
    quantization: Literal["auto", "none", "fp8"] = "auto"
    """Format of the projections and experts: fp8: E4M3 in blocks of 128 x 128, none: as computed; auto: as they are."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, cache and everything else may take."""
    backend: Literal["auto", "plain", "fused"] = "auto"
    """fused: kernels and CUDA graphs, for MLA models in 16 bits; plain: the model's own code; auto: fused on a GPU."""
    deterministic: bool = False
    """A request's tokens and log-probabilities are the same, bit for bit, in any company, however its prompt is cut,
    cached or computed again, with drafts or without. Slower, above all for long prompts."""
    return_routed_experts: bool = False
    """Outputs say which experts each token visited in every mixture layer, so that training can take the same ones."""
    num_pages: int = 0
    """Cache pages; 0 takes enough for max_num_seqs requests of max_model_len tokens, or what a GPU has room for."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
            _integer(name, getattr(self, name), 1, MAX_INTEGER)
        for name in ("max_model_len", "num_pages"):
            _integer(name, getattr(self, name), 0, MAX_INTEGER)
        _integer("num_speculative_tokens", self.num_speculative_tokens, 0, MAX_DRAFTS)
        for name in ("adaptive_speculation", "deterministic", "return_routed_experts"):
            _flag(name, getattr(self, name))
        for name, values in (
            ("kv_cache_dtype", ("auto", "fp8", "int6")),
            ("quantization", ("auto", "none", "fp8")),
            ("backend", ("auto", "plain", "fused")),
        ):
            if getattr(self, name) not in values:
                raise InputError(f"{name}={getattr(self, name)!r} -> use one of {', '.join(values)}")
        _number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"gpu_memory_utilization={self.gpu_memory_utilization} -> use a share above 0, up to 1")

    def resolve(self, max_position_embeddings: int, num_nextn_predict_layers: int) -> Self:
        """Fill in the zeros for a model and refuse what it cannot do."""
        length = self.max_model_len or max_position_embeddings
        _integer("max_model_len", length, 2, max_position_embeddings)
        _integer(
            "num_speculative_tokens", self.num_speculative_tokens, 0, MAX_DRAFTS if num_nextn_predict_layers else 0
        )
        longest = -(-length // self.page_size)
        pages = self.num_pages or self.max_num_seqs * (longest + 1)  # one to grow into, without which none is let in
        if pages < longest:
            raise InputError(
                f"num_pages={pages} holds less than one request of max_model_len={length} -> use {longest} or more"
            )
        return replace(self, max_model_len=length, num_pages=pages)


JSON_OBJECT = '{"type":"object","additionalProperties":true}'


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What form an answer must have: nothing, or one of the five. Sizes and time are bounded by `grammar.LIMITS`."""

    json: str | Mapping[str, Any] = ""
    """A JSON schema, as text or as an object; kept as text."""
    regex: str = ""
    """A regular expression that the whole answer matches."""
    grammar: str = ""
    """A grammar in EBNF (GBNF's dialect) with a rule `root`."""
    json_object: bool = False
    """Any JSON object."""
    structural_tag: str | Mapping[str, Any] = ""
    """One of xgrammar's structural tags, which may name tokens by their ids: how `calls.form` writes tool calls."""
    after_thinking: bool = False
    """Bind only what follows the first `</think>` of the answer."""

    def __post_init__(self) -> None:
        for name in ("json", "structural_tag"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, _json_text(name, value))
        for name in ("json", "regex", "grammar", "structural_tag"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={getattr(self, name)!r:.40} is no text -> give a string")
        for name in ("json_object", "after_thinking"):
            _flag(name, getattr(self, name))
        forms = ("json", "regex", "grammar", "json_object", "structural_tag")
        given = [name for name in forms if getattr(self, name)]
        if len(given) > 1:
            raise InputError(f"structured_outputs asks for {' and '.join(given)} at once -> give one of them")
        if self.after_thinking and not given:
            raise InputError("after_thinking=True without a form -> give json, regex, grammar or json_object too")

    @property
    def form(self) -> tuple[str, str]:
        """Which of them, and its text: ("regex", "a+"). ("", "") without any."""
        if self.json_object:
            return "json", JSON_OBJECT
        texts = {name: str(getattr(self, name)) for name in ("json", "regex", "grammar", "structural_tag")}
        return next(((name, text) for name, text in texts.items() if text), ("", ""))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    Order: logit_bias, structured_outputs, min_tokens, repetition_penalty, frequency_penalty, presence_penalty,
    temperature, top_k, top_p of what is left, min_p.
    """

    max_tokens: int = 16
    """Most tokens to generate."""
    min_tokens: int = 0
    """No end before so many tokens: those that end the answer are not chosen, stop strings do not count."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability mass, the one that crosses it included."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, compared with the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that stand in prompt or answer, and multiplies negative ones."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that stand in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens of the answer, once for each time they stand there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids."""
    seed: int = 0
    """Seed of the request's own random numbers: the same seed and prompt give the same answer in any company."""
    stop: tuple[str, ...] = ()
    """Generation ends where one of these texts is complete; a single string is taken as one text."""
    include_stop_str_in_output: bool = False
    """Whether `text` ends with the stop string or before it."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these (or with the tokenizer's end of sentence); the token is part of the answer."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end of sentence."""
    n: int = 1
    """Samples of the prompt, see `samples`."""
    logprobs: int = 0
    """How many of the likeliest tokens to report, with their log-probabilities, beside each chosen one."""
    prompt_logprobs: int = -1
    """How many of the likeliest tokens to report in place of each prompt token, beside the token's own
    log-probability; 0 reports that alone, -1 nothing. Such a prompt is computed whole, whatever of it is cached."""
    structured_outputs: StructuredOutputsParams = field(default_factory=StructuredOutputsParams)
    """The form that the answer must have."""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, MAX_INTEGER)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _between("temperature", self.temperature, 0, math.inf)
        _number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is out of bounds -> use a number above 0 and up to 1")
        _integer("top_k", self.top_k, 0, MAX_INTEGER)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        self._check_bias()
        _integer("seed", self.seed, 0, 2**63 - 1)
        self._check_ends()
        _integer("n", self.n, 1, MAX_SAMPLES)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("prompt_logprobs", self.prompt_logprobs, -1, MAX_LOGPROBS)
        self._check_form()

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias={self.logit_bias!r:.40} is no mapping -> give {{token id: number}}")
        if len(self.logit_bias) > MAX_BIASES:
            raise InputError(f"logit_bias={{...}} has {len(self.logit_bias)} tokens -> give at most {MAX_BIASES}")
        for token, value in self.logit_bias.items():
            _integer("logit_bias", token, 0, MAX_INTEGER)
            _between(f"logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _check_ends(self) -> None:
        object.__setattr__(self, "stop", _sequence("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InputError(
                    f"stop={text!r:.40} is no stop string -> give texts of 1 to {MAX_STOP_CHARACTERS} characters"
                )
        object.__setattr__(self, "stop_token_ids", _sequence("stop_token_ids", self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, MAX_INTEGER)
        for name in ("include_stop_str_in_output", "ignore_eos"):
            _flag(name, getattr(self, name))

    def _check_form(self) -> None:
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise InputError(
                f"structured_outputs={self.structured_outputs!r:.40} is no form -> give StructuredOutputsParams(...)"
            )
        if self.guided and (self.min_tokens or self.ignore_eos):
            name, default = ("min_tokens", 0) if self.min_tokens else ("ignore_eos", False)
            raise InputError(
                f"{name}={getattr(self, name)} with structured_outputs: a whole form must be able to end "
                f"-> use {name}={default}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def guided(self) -> bool:
        """Whether the answer must have a form."""
        return self.structured_outputs.form != ("", "")

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


def _between(name: str, value: float, low: float, high: float) -> None:
    _number(name, value)
    if not low <= value <= high:
        bounds = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
        raise InputError(f"{name}={value} is out of bounds -> use {bounds}")


def _json_text(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}={value!r:.40} is no JSON ({error}) -> give JSON") from error


def _flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise InputError(f"{name}={value!r} is no truth value -> use True or False")


def _sequence(name: str, value: object) -> tuple:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name}={value!r} is no list -> give a list")
    items = tuple(value)
    if len(items) > MAX_STOPS:
        raise InputError(f"{name} has {len(items)} entries -> give at most {MAX_STOPS}")
    return items
