"""Messages to ids in the chat formats of the family, with the loss mask made in the same pass."""

import json
from collections.abc import Sequence
from typing import Any

from benthic.base.errors import InputError, did_you_mean
from benthic.tokenizer import foreign
from benthic.tokenizer import tools as declared
from benthic.tokenizer.runs import Rendered, Runs
from benthic.tokenizer.templates import (
    DECLARED,
    OF_TOOL,
    TEMPLATES,
    Template,
    ThinkingRefused,
    Tools,
    fitting,
    lacking,
)
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tokens import CALLS, END_CALLS, END_OUTPUT, END_THINK, MARKUP, OUTPUT, THINK, THINKING

KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
Messages = Sequence[dict[str, Any]]


def render(
    messages: Messages,
    tokenizer: Tokenizer,
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Rendered:
    """The conversation in the tokenizer's chat format, which `Tokenizer.with_template` changes.

    `add_generation_prompt` ends it with what asks for an answer; `thinking` chooses whether the model shall think
    where the format knows both (V3.1; without thinking unless asked), and is ThinkingRefused elsewhere. An answer that
    a user turn follows loses its thinking. Only assistant turns can hold thinking tokens: everywhere else a token's
    name is plain text. `tools` are declared behind the system prompt, as `tools.check` takes them; InputError where the
    format has no words for them. A Jinja template that is none of ours is served by `foreign.render`. InputError names
    the message at fault.
    """
    declared.check(tools)
    name = tokenizer.template
    known = TEMPLATES[name] if name else None
    able = known is None or (known.tools is not None and CALLS in tokenizer.special)
    _check_messages(messages, able)
    if tools and not able:
        raise InputError(f"tools, but template {name!r} or the tokenizer has no words for them -> use one that has")
    if known is None:
        return foreign.render(messages, tokenizer, add_generation_prompt, thinking, tools)
    thinks = _choice(known, name, thinking)
    return _Conversation(known, tokenizer).render(messages, thinks if add_generation_prompt else None, tools)


def check(tokenizer: Tokenizer, thinking: bool | None = None) -> None:
    """Say before the first conversation what is wrong with the tokenizer's chat format.

    InputError for a template that cannot be rendered or that needs tokens which the tokenizer lacks; ThinkingRefused
    where it has no such choice.
    """
    name = tokenizer.template
    if not name:
        foreign.check(tokenizer, thinking)
        return
    missing = lacking(TEMPLATES[name], tokenizer.special)
    if missing:
        raise InputError(
            f"template {name!r} needs the token {missing[0]!r}, which the tokenizer lacks "
            f"-> use {fitting(tokenizer.special)!r}, made for its tokens"
        )
    _choice(TEMPLATES[name], name, thinking)


def _choice(template: Template, name: str | None, thinking: bool | None) -> bool:
    """Whether the model shall think; the first opening says it where nobody else does."""
    if thinking is None:
        return next(iter(template.openings))
    if thinking not in template.openings:
        raise ThinkingRefused(f"thinking={thinking} is not a choice in template {name!r} -> leave it out")
    return thinking


class _Conversation:
    """One rendering: `previous` is the role of the last turn that was not a system turn."""

    def __init__(self, template: Template, tokenizer: Tokenizer):
        self._template, self._tokenizer = template, tokenizer
        self._runs = Runs(tokenizer)
        self._previous = ""

    def render(self, messages: Messages, prompt: bool | None, tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """`prompt` is None, or whether the model shall think in the answer that is asked for."""
        self._runs.token(self._tokenizer.bos_id, False)
        systems = [m["content"] for m in messages if m["role"] == "system"]
        if self._template.system != "in place":
            self._runs.text("\n\n".join(systems if self._template.system == "joined" else systems[-1:]), False)
        if tools and self._template.tools:
            self._declare(tools, self._template.tools)
        last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        for i, message in enumerate(messages):
            if message["role"] == "system":
                if self._template.system == "in place":
                    self._runs.text(message["content"] + "\n\n", False)
                continue
            if message["role"] != "tool":
                self._end_outputs()
            if message["role"] == "user":
                self._markup(self._template.user)
                self._runs.text(message["content"], False)
                self._markup(self._template.end_user)
            elif message["role"] == "assistant":
                self._answer(message, past=i < last_user)
            elif self._template.tools:
                self._output(message["content"], self._template.tools)
            self._previous = message["role"]
        self._end_outputs()
        if prompt is None or not self._asks():
            return self._runs.rendered()
        opening = self._template.openings[prompt]
        self._markup(self._template.assistant + opening)
        return self._runs.rendered(opening, self._template.lead)

    def _declare(self, tools: Sequence[dict[str, Any]], form: Tools) -> None:
        before, description, parameters, after = OF_TOOL
        self._runs.text(DECLARED, False)
        for tool in tools:
            function = tool["function"]
            said = before + function["name"] + description + (function.get("description") or "")
            self._runs.text(said + parameters + declared.parameters(function) + after, False)
        self._markup(form.rules)

    def _answer(self, message: dict[str, Any], past: bool) -> None:
        content = message.get("content") or ""
        if past and self._template.forgets:
            content = content.split(END_THINK, 1 if self._template.forgets == "first" else -1)[-1]
        if self._asks():
            opening = self._template.openings.get(END_THINK in content, "")
            if content.startswith(THINK):  # it holds its own opening, and perhaps a thought without an end
                opening, content = _common_start(self._template.openings.get(True, ""), content)
            self._markup(self._template.assistant + opening)
        self._said(self._template.lead + content)
        if message.get("tool_calls") and self._template.tools:
            self._calls(message["tool_calls"], self._template.tools)
        self._runs.token(self._tokenizer.eos_id, True)

    def _calls(self, calls: list[dict[str, Any]], tools: Tools) -> None:
        before, middle, after = tools.call
        self._markup(CALLS, trained=True)
        for i, call in enumerate(calls):
            arguments = call["function"]["arguments"]
            self._markup((tools.between_calls if i else "") + before, trained=True)
            self._runs.text(call["function"]["name"], True)
            self._markup(middle, trained=True)
            as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            self._runs.text(as_text, True)
            self._markup(after, trained=True)
        self._markup(END_CALLS, trained=True)

    def _output(self, content: str, tools: Tools) -> None:
        self._markup((tools.between_outputs if self._previous == "tool" else tools.outputs) + OUTPUT)
        self._runs.text(content, False)
        self._markup(END_OUTPUT)

    def _end_outputs(self) -> None:
        if self._previous == "tool" and self._template.tools:
            self._markup(self._template.tools.end_outputs)
            self._previous = "outputs"

    def _asks(self) -> bool:
        """Whether an answer begins with `assistant` here: not after outputs, which the same answer continues."""
        if self._template.after_user_only:
            return self._previous == "user"
        return self._previous not in ("tool", "outputs")

    def _markup(self, text: str, trained: bool = False) -> None:
        """The format's own words. InputError for a token that the tokenizer lacks; thinking tokens may be text."""
        for part in MARKUP.split(text):
            if MARKUP.fullmatch(part) and (part in self._tokenizer.special or part not in (THINK, END_THINK)):
                self._runs.token(self._tokenizer.id_of(part), trained)
            else:
                self._runs.text(part, trained)

    def _said(self, text: str) -> None:
        """An answer, with `<think>` and `</think>` as tokens, where the tokenizer has them."""
        for part in THINKING.split(text):
            if THINKING.fullmatch(part) and part in self._tokenizer.special:
                self._runs.token(self._tokenizer.special[part], True)
            else:
                self._runs.text(part, True)


def _common_start(opening: str, content: str) -> tuple[str, str]:
    """What `content` has in common with the start of `opening`, and the rest of `content`."""
    n = next((i for i, (a, b) in enumerate(zip(opening, content)) if a != b), min(len(opening), len(content)))
    return content[:n], content[n:]


def _check_messages(messages: Messages, tools: bool) -> None:
    if not messages:
        raise InputError("messages is empty -> give at least one message")
    roles = [role for role in KEYS if tools or role != "tool"]
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"messages[{i}] is {message!r} -> give an object with role and content")
        role = message.get("role")
        if role not in roles and "role" in message:
            raise InputError(f"role is {role!r} in messages[{i}] -> use one of {', '.join(roles)}")
        keys = KEYS[role] if role else ("role", "content")
        for key in message:
            if key not in keys:
                raise InputError(f"unknown key {key!r} in messages[{i}] -> remove it{did_you_mean(key, keys)}")
        if role is None:
            raise InputError(f"messages[{i}] has no role -> use one of {', '.join(roles)}")
        if message.get("tool_calls") is not None:
            _check_calls(message["tool_calls"], f"messages[{i}]", tools)
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(f"content is {content!r} in messages[{i}] -> give a string")


def _check_calls(calls: Any, where: str, tools: bool) -> None:
    if not isinstance(calls, list):
        raise InputError(f"tool_calls is {calls!r} in {where} -> give a list")
    if calls and not tools:
        raise InputError(f"tool_calls in {where}, but the tokenizer or its template has no tools -> use one that has")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        fields = function if isinstance(function, dict) and call.get("type") in (None, "function") else {}
        if not isinstance(fields.get("name"), str) or not isinstance(fields.get("arguments"), str | dict):
            raise InputError(
                f"tool call {call!r} in {where} -> give "
                '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            )
