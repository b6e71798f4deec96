"""The one table of limits on what a client may send. The validator, the OpenAPI page, the documentation and the tests
read it.

Every limit is checked before the memory or time that it bounds is spent.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Limit(NamedTuple):
    """An inclusive range. `meaning` completes the sentence "the limit is on ..."."""

    low: float
    high: float
    meaning: str


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "header_count": Limit(0, 100, "header lines of a request"),
        "header_bytes": Limit(0, 16 * 1024, "bytes of all header names and values"),
        "body_bytes": Limit(0, 2 * 1024 * 1024, "bytes of a request body"),
        "brackets": Limit(0, 2**16, "opening brackets of a body, those in texts included"),
        "all_body_bytes": Limit(0, 256 * 1024 * 1024, "bytes of the bodies of all requests together"),
        "connections": Limit(0, 4096, "connections; half as many where the system allows fewer open files"),
        "head_seconds": Limit(0, 20, "seconds a client may take to send the head of a request"),
        "body_seconds": Limit(0, 30, "seconds a client may take to send its body"),
        "send_seconds": Limit(0, 60, "seconds a client may leave its answer unread before it loses it"),
        "model": Limit(1, 256, "characters of the model's name"),
        "messages": Limit(1, 1024, "messages of a conversation"),
        "content": Limit(1, 256, "parts of one message's content, where it is a list"),
        "prompts": Limit(1, 256, "prompts of one request"),
        "answers": Limit(1, 256, "answers to one request: its prompts times n"),
        "prompt_tokens": Limit(1, 2**20, "tokens of one prompt; the model's context may allow fewer"),
        "max_tokens": Limit(0, 2**20, "tokens of the answer; the context that the prompt leaves may allow fewer"),
        "min_tokens": Limit(0, 2**20, "tokens before which the answer does not end"),
        "token": Limit(0, 2**31 - 1, "token id; the vocabulary may allow fewer"),
        "temperature": Limit(0, 2, "sampling temperature; 0 is greedy"),
        "top_p": Limit(1e-6, 1, "probability mass to sample from"),
        "top_k": Limit(-1, 2**31 - 1, "tokens to sample from; -1 and 0 are all"),
        "min_p": Limit(0, 1, "least probability, compared with that of the likeliest token"),
        "presence_penalty": Limit(-2, 2, "penalty for tokens that the answer holds"),
        "frequency_penalty": Limit(-2, 2, "penalty for each time that the answer holds a token"),
        "repetition_penalty": Limit(0.01, 100, "factor against tokens of prompt and answer; 1 is none"),
        "logit_bias": Limit(0, 1024, "tokens with a bias"),
        "bias": Limit(-100, 100, "bias of one token"),
        "seed": Limit(0, 2**63 - 1, "seed of the sampling"),
        "n": Limit(1, 128, "answers to one prompt"),
        "logprobs": Limit(0, 20, "likeliest tokens reported beside each token of the answer"),
        "prompt_logprobs": Limit(0, 20, "likeliest tokens reported beside each token of the prompt"),
        "timeout": Limit(0.001, 86400, "seconds that a request may take, waiting included; the server may allow fewer"),
        "priority": Limit(-(2**31), 2**31 - 1, "place among a client's own waiting requests; smaller goes first"),
        "cache_salt": Limit(1, 256, "characters of the cache salt"),
        "stop": Limit(0, 16, "stop strings"),
        "stop_characters": Limit(1, 128, "characters of one stop string"),
        "stop_token_ids": Limit(0, 64, "stop tokens"),
        "tools": Limit(0, 128, "tools"),
        "tool_calls": Limit(0, 128, "tool calls of one message"),
        "tool_call_id": Limit(1, 256, "characters of a tool call's id"),
        "function_name": Limit(1, 64, "characters of a function's name"),
        "tool_depth": Limit(0, 80, "levels of all tools, as JSON"),
        "tool_bytes": Limit(0, 256 * 1024, "bytes of all tools together, as JSON"),
        "schema_bytes": Limit(0, 64 * 1024, "bytes of a JSON schema, as JSON"),
        "schema_depth": Limit(0, 64, "levels of a JSON schema"),
        "grammar": Limit(1, 64 * 1024, "characters of a grammar"),
        "regex": Limit(1, 4096, "characters of a regular expression"),
        "choice": Limit(1, 1024, "texts to choose the answer from"),
        "choice_characters": Limit(1, 1024, "characters of one text to choose"),
        "tokens": Limit(0, 2**20, "tokens to turn into text"),
        "render_texts": Limit(1, 256, "texts of one request to /render"),
        "render_characters": Limit(0, 32 * 1024, "characters of all texts of one request to /render"),
        "render_waiting": Limit(0, 32, "requests to /render that wait for their turn"),
        "formula_characters": Limit(1, 2048, "characters of one formula; a longer one is shown as it is written"),
        "formula_lines": Limit(1, 64, "lines of one formula; a longer one is shown as it is written"),
    }
)
