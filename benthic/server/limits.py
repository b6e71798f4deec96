"""The one table of limits on what a client may send. The validator, the documentation and the tests read it.

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
        "body_seconds": Limit(0, 30, "seconds a client may take to send its body"),
        "send_seconds": Limit(0, 60, "seconds a client may leave its answer unread before it loses it"),
        "model": Limit(1, 256, "characters of the model's name"),
        "messages": Limit(1, 1024, "messages of a conversation"),
        "content": Limit(1, 256, "parts of one message's content, where it is a list"),
        "prompt_tokens": Limit(1, 2**20, "tokens of the rendered prompt; the model's context may allow fewer"),
        "max_tokens": Limit(1, 2**20, "tokens of the answer; the context that the prompt leaves may allow fewer"),
        "temperature": Limit(0, 2, "sampling temperature; 0 is greedy"),
        "top_p": Limit(1e-6, 1, "probability mass to sample from"),
        "seed": Limit(0, 2**63 - 1, "seed of the sampling"),
        "n": Limit(1, 1, "answers to one request"),
        "stop": Limit(0, 16, "stop strings"),
        "stop_characters": Limit(1, 128, "characters of one stop string"),
        "render_texts": Limit(1, 256, "texts of one request to /render"),
        "render_characters": Limit(0, 32 * 1024, "characters of all texts of one request to /render"),
        "render_waiting": Limit(0, 32, "requests to /render that wait for their turn"),
        "formula_characters": Limit(1, 2048, "characters of one formula; a longer one is shown as it is written"),
        "formula_lines": Limit(1, 64, "lines of one formula; a longer one is shown as it is written"),
    }
)
