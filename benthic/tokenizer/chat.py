"""Messages to ids in the format of DeepSeek-V3 and R1, with the loss mask made in the same pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benthic.base.errors import InputError, did_you_mean
from benthic.tokenizer import tokens
from benthic.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_THINKING = re.compile(f"({re.escape(tokens.THINK)}|{re.escape(tokens.END_THINK)})")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """ids of a conversation; mask is True on what the assistant says, its end token included."""

    ids: list[int]
    mask: list[bool]


def render(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> Rendered:
    """`{bos}{system}<｜User｜>{user}<｜Assistant｜>{answer}{eos}`, and `<｜Assistant｜>` last to ask for an answer.

    System turns go first, joined by a blank line. An answer that a user turn follows keeps only what comes after
    `</think>`. Only assistant turns can hold thinking tokens: everywhere else a token's name is plain text.
    """
    _check(messages)
    user, assistant = tokenizer.id_of(tokens.USER), tokenizer.id_of(tokens.ASSISTANT)
    ids, mask = [tokenizer.bos_id], [False]

    def add(new: list[int], trained: bool) -> None:
        ids.extend(new)
        mask.extend([trained] * len(new))

    add(tokenizer.encode("\n\n".join(m["content"] for m in messages if m["role"] == "system")), False)
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            add([user, *tokenizer.encode(content)], False)
        elif message["role"] == "assistant":
            content = content.split(tokens.END_THINK)[-1] if i < last_user else content
            add([assistant], False)
            add([*_encode_answer(content, tokenizer), tokenizer.eos_id], True)
    if add_generation_prompt:
        add([assistant], False)
    return Rendered(ids=ids, mask=mask)


def _encode_answer(content: str, tokenizer: Tokenizer) -> list[int]:
    """Encode with `<think>` and `</think>` as tokens, where the tokenizer has them."""
    ids = []
    for part in _THINKING.split(content):
        is_token = _THINKING.fullmatch(part) and part in tokenizer.special
        ids += [tokenizer.special[part]] if is_token else tokenizer.encode(part)
    return ids


def _check(messages: Sequence[dict[str, str]]) -> None:
    if not messages:
        raise InputError("messages is empty -> give at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"messages[{i}] is {message!r} -> give an object with role and content")
        for key in message:
            if key not in ("role", "content"):
                raise InputError(
                    f"unknown key {key!r} in messages[{i}] -> remove it{did_you_mean(key, ['role', 'content'])}"
                )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"{key} is {message.get(key)!r} in messages[{i}] -> give a string")
        if message["role"] not in ROLES:
            raise InputError(f"role is {message['role']!r} in messages[{i}] -> use one of {', '.join(ROLES)}")
