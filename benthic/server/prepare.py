"""A request becomes what the engine takes: ids and sampling parameters, and how its answer is to be read.

The only room that knows tokenizer and chat template.
"""

import asyncio
import codecs
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benthic.base.errors import InputError
from benthic.inference import calls
from benthic.inference.config import SamplingParams, StructuredOutputsParams
from benthic.inference.request import Request
from benthic.server.answer import PLAIN, Style
from benthic.server.calls import can_call
from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.service import Service
from benthic.server.types.chat import (
    AssistantMessage,
    ChatRequest,
    Content,
    Conversation,
    Message,
    NamedChoice,
    ToolMessage,
)
from benthic.server.types.completions import CompletionRequest
from benthic.server.types.sampling import JsonSchemaFormat, Sampling
from benthic.tokenizer import chat
from benthic.tokenizer.runs import Rendered
from benthic.tokenizer.templates import ThinkingRefused
from benthic.tokenizer.tokens import END_THINK, THINK

LONG = 4096  # characters from which a prompt is made in a thread
DEFAULT_TOKENS = 16  # of a completion whose request does not say
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    ids: list[int]
    text: str = ""
    """What `echo` shows of it."""
    offsets: list[int] = field(default_factory=list)
    """Where its tokens begin in that text; [] where their log-probabilities are not shown."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one HTTP request asks of the engine."""

    prompts: list[Prompt]
    requests: list[Request]
    """`n` for each prompt, in order."""
    n: int
    style: Style = PLAIN
    calls: bool = False
    """The answer may hold tool calls."""
    mute: bool = False
    """The one token that the engine makes was not asked for (max_tokens 0)."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(len(prompt.ids) for prompt in self.prompts)


async def for_chat(service: Service, ask: ChatRequest) -> Job:
    """The job of a conversation. ApiError 400 where it cannot be rendered or does not fit."""
    rendered = await render(service, ask)
    lead = ask.messages[-1] if ask.echo else None
    prompt = Prompt(ids=rendered.ids, text=_text(lead.content) if isinstance(lead, AssistantMessage) else "")
    form, param = _form(ask, rendered.thinks)
    if ask.calls in ("required", "named"):
        form, param = _call_form(service, ask, rendered.thinks), "tool_choice"
    if param:
        await service.forms.check(form, param)
    params = _params(service, ask, prompt.ids, ask.most_tokens, form, "messages", ask.top_logprobs)
    style = Style(
        stop=tuple(ask.stop),
        include_stop=ask.include_stop_str_in_output,
        min_tokens=ask.min_tokens,
        skip_special=ask.skip_special_tokens,
        thinks=rendered.thinks,
        lead=rendered.lead,
    )
    return Job(
        prompts=[prompt], requests=_requests(ask, prompt, params), n=ask.n, style=style, calls=ask.calls != "none"
    )


async def for_completion(service: Service, ask: CompletionRequest) -> Job:
    """The job of plain prompts. ApiError 400 where one does not fit."""
    size = sum(len(prompt) for prompt in ask.prompts if isinstance(prompt, str))
    prompts = await _made(size, lambda: [_prompt(service, prompt, ask) for prompt in ask.prompts])
    form, param = _form(ask, False)
    if param:
        await service.forms.check(form, param)
    requests: list[Request] = []
    for prompt in prompts:
        params = _params(service, ask, prompt.ids, ask.max_tokens, form, "prompt", ask.logprobs or 0, DEFAULT_TOKENS)
        requests += _requests(ask, prompt, params)
    style = Style(
        stop=tuple(ask.stop),
        include_stop=ask.include_stop_str_in_output,
        min_tokens=ask.min_tokens,
        skip_special=ask.skip_special_tokens,
        splits=False,
    )
    return Job(prompts=prompts, requests=requests, n=ask.n, style=style, mute=ask.max_tokens == 0)


async def render(service: Service, ask: Conversation) -> Rendered:
    """The prompt of a conversation. ApiError 400 names the field at fault."""
    declared = [] if isinstance(ask, ChatRequest) and ask.calls == "none" else ask.tools
    tools = [tool.model_dump(exclude_none=True, exclude_defaults=True) for tool in declared]
    if tools and not can_call(service.tokenizer):
        message = "tools: the chat template or the tokenizer has no words for them; use a model that has"
        raise ApiError(400, message, param="tools")
    size = sum(len(_text(message.content)) for message in ask.messages) + len(_json(tools))
    return await _made(size, lambda: _render(service, ask, tools))


async def encode(service: Service, text: str, begin: bool) -> list[int]:
    """Ids of a text, after the begin-of-sentence token if asked for."""
    ids = await _made(len(text), lambda: service.tokenizer.encode(text))
    return [service.tokenizer.bos_id, *ids] if begin else ids


async def _made(size: int, make: Callable[[], Made]) -> Made:
    """What `make` returns: from a thread where it takes a while, so that the loop goes on."""
    return make() if size < LONG else await asyncio.to_thread(make)


def _render(service: Service, ask: Conversation, tools: list[dict[str, Any]]) -> Rendered:
    tokenizer = service.tokenizer
    thinking = service.thinking if ask.thinking is None else ask.thinking
    messages = [_message(message) for message in ask.messages]
    try:
        rendered = chat.render(messages, tokenizer, ask.add_generation_prompt, thinking, tools)
    except ThinkingRefused as error:
        raise ApiError(400, str(error), param="chat_template_kwargs.thinking") from error
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error
    if not ask.continue_final_message:
        return rendered
    if not rendered.ids or rendered.ids[-1] != tokenizer.eos_id:
        message = "continue_final_message: the chat template writes more after an answer than its end; leave it out"
        raise ApiError(400, message, param="continue_final_message")
    said = messages[-1]["content"]
    thinks = THINK in said and END_THINK not in said
    return Rendered(ids=rendered.ids[:-1], mask=rendered.mask[:-1], opening=THINK if thinks else "")


def _message(message: Message) -> dict[str, Any]:
    """A message as the chat format takes it."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message, AssistantMessage):
        fields: dict[str, Any] = {"role": role, "content": _text(message.content)}
        if message.tool_calls:
            fields["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
        return fields
    if isinstance(message, ToolMessage):
        named = {} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}
        return {"role": role, "content": _text(message.content), **named}
    return {"role": role, "content": _text(message.content)}


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _prompt(service: Service, prompt: str | list[int], ask: CompletionRequest) -> Prompt:
    tokenizer = service.tokenizer
    if isinstance(prompt, str):
        begin = [tokenizer.bos_id] if ask.add_special_tokens else []
        ids = [*begin, *tokenizer.encode(prompt)]
    else:
        ids = prompt
        service.check_ids(ids, "prompt")
    if not ids:
        raise ApiError(400, "prompt: has no token; use at least one", param="prompt")
    if not ask.echo:
        return Prompt(ids=ids)
    decoder, text, offsets = codecs.getincrementaldecoder("utf-8")("replace"), "", []
    for id in ids:
        offsets.append(len(text))
        text += decoder.decode(tokenizer.bytes_of_all((id,), ask.skip_special_tokens))
    text += decoder.decode(b"", True)
    return Prompt(ids=ids, text=text, offsets=[] if ask.logprobs is None else offsets)


def _form(ask: Sampling, thinks: bool) -> tuple[StructuredOutputsParams, str]:
    """The form of the answer and the field that asks for it; "" where none does. A thought is not bound."""
    param = next(iter(ask.forms()), "")
    asked: dict[str, Any] = {}
    outputs = ask.structured_outputs
    if isinstance(ask.response_format, JsonSchemaFormat):
        asked["json"] = _json(ask.response_format.json_schema.schema_)
    elif param == "response_format" or (outputs is not None and outputs.json_object):
        asked["json_object"] = True
    elif param:
        json_schema = outputs.json_ if outputs else ask.guided_json
        regex, choice = (outputs.regex, outputs.choice) if outputs else (ask.guided_regex, ask.guided_choice)
        grammar = outputs.grammar if outputs else ask.guided_grammar
        if json_schema is not None:
            asked["json"] = _json(json_schema)
        if choice is not None:
            grammar = "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
        asked |= {name: text for name, text in (("regex", regex), ("grammar", grammar)) if text}
    return StructuredOutputsParams(**asked, after_thinking=bool(asked) and thinks), param


def _call_form(service: Service, ask: ChatRequest, thinks: bool) -> StructuredOutputsParams:
    """The form of an answer that must call a tool."""
    name = ask.tool_choice.function.name if isinstance(ask.tool_choice, NamedChoice) else ""
    tools = [tool.model_dump(exclude_none=True) for tool in ask.tools]
    try:
        return calls.form(service.tokenizer, tools, name, parallel=ask.parallel_tool_calls, after_thinking=thinks)
    except InputError as error:
        raise ApiError(400, f"tool_choice: {error}", param="tool_choice") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _params(
    service: Service,
    ask: Sampling,
    ids: list[int],
    asked: int | None,
    form: StructuredOutputsParams,
    where: str,
    logprobs: int,
    default: int = 0,
) -> SamplingParams:
    """How to sample after one prompt; `asked` tokens at most, else `default`, or what the context leaves (0)."""
    room = min(service.max_model_len - len(ids), int(LIMITS["max_tokens"].high))
    if room < 1 or len(ids) > LIMITS["prompt_tokens"].high:
        raise _too_long(where, f"the prompt has {len(ids)} tokens", service)
    if asked is not None and asked > room:
        sizes = f"the prompt has {len(ids)} tokens and max_tokens is {asked}"
        raise _too_long("max_tokens", sizes, service)
    most = max(1, asked) if asked is not None else min(default or room, room)
    if ask.min_tokens > most:
        raise ApiError(400, f"min_tokens: is {ask.min_tokens}, there is room for {most}", param="min_tokens")
    bias = {int(token): value for token, value in ask.logit_bias.items()}
    service.check_ids(list(bias), "logit_bias")
    try:
        return SamplingParams(
            max_tokens=most,
            min_tokens=ask.min_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=max(0, ask.top_k),
            min_p=ask.min_p,
            repetition_penalty=ask.repetition_penalty,
            presence_penalty=ask.presence_penalty,
            frequency_penalty=ask.frequency_penalty,
            logit_bias=bias,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed,
            stop=tuple(ask.stop),
            include_stop_str_in_output=ask.include_stop_str_in_output,
            stop_token_ids=tuple(ask.stop_token_ids),
            ignore_eos=ask.ignore_eos,
            n=ask.n,
            logprobs=logprobs,
            prompt_logprobs=_prompt_logprobs(ask),
            structured_outputs=form,
        )
    except InputError as error:
        raise ApiError(400, str(error)) from error


def _prompt_logprobs(ask: Sampling) -> int:
    """How many likeliest tokens to report in place of each prompt token; -1: nothing of the prompt."""
    wanted = [ask.prompt_logprobs] if ask.prompt_logprobs is not None else []
    if isinstance(ask, CompletionRequest) and ask.echo and ask.logprobs is not None:
        wanted.append(ask.logprobs)
    return max(wanted, default=-1)


def _requests(ask: Sampling, prompt: Prompt, params: SamplingParams) -> list[Request]:
    salt = ask.cache_salt or ""
    return [
        Request(prompt_token_ids=prompt.ids, params=sample, priority=ask.priority, cache_salt=salt)
        for sample in params.samples()
    ]


def _too_long(param: str, sizes: str, service: Service) -> ApiError:
    message = f"{sizes}; prompt and answer together may have {service.max_model_len} -> shorten one of them"
    return ApiError(400, message, param=param, code="context_length_exceeded")
