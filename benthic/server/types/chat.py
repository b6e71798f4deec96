"""POST /v1/chat/completions: the request."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from benthic.server.types.base import TAG, JsonSchema, JsonWithin, Strict, Within, fault, short
from benthic.server.types.sampling import NO_EFFECT, NOTHING, Sampling
from benthic.tokenizer.tools import NAME

ROLES = ("system", "developer", "user", "assistant", "tool")


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("type") != "text":
            raise fault("not a text part; this server reads text only")
        return value


def _by_kind(value: Any) -> str:
    return f"{TAG}parts" if isinstance(value, list) else f"{TAG}text"


Content = Annotated[
    Annotated[str, Tag(f"{TAG}text")] | Annotated[Annotated[list[TextPart], Within("content")], Tag(f"{TAG}parts")],
    Discriminator(_by_kind),
]


class SystemMessage(Strict):
    """What holds for the whole conversation. `developer` is another word for it."""

    NEUTRAL: ClassVar = {"name": ()}
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    """What the user says."""

    NEUTRAL: ClassVar = {"name": ()}
    role: Literal["user"]
    content: Content

    @model_validator(mode="before")
    @classmethod
    def _known_role(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise fault("not an object with role and content")
        if value.get("role") != "user":
            raise fault(f"{short(value.get('role'))} is not one of {', '.join(ROLES)}", "role")
        return value


class CalledFunction(Strict):
    """A function's name and its arguments, as JSON in a text."""

    name: Annotated[str, Within("function_name")]
    arguments: str


class ToolCall(Strict):
    """A call that the assistant made."""

    HARMLESS: ClassVar = {"index": "the list has an order"}
    id: Annotated[str, Within("tool_call_id")]
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Strict):
    """An earlier answer, as it came from the server."""

    HARMLESS: ClassVar = {
        "reasoning_content": "chat templates drop the thoughts of earlier answers",
        "reasoning": "chat templates drop the thoughts of earlier answers",
    }
    NEUTRAL: ClassVar = {"annotations": ([],), "audio": (), "function_call": (), "name": (), "refusal": ()}
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Within("tool_calls")] = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise fault("required where there are no tool calls", "content")
        return self


class ToolMessage(Strict):
    """What a called tool returned."""

    HARMLESS: ClassVar = {"name": "chat templates write outputs in the order of the calls"}
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Within("tool_call_id")] | None = None


def _by_role(value: Any) -> str:
    """A role that is none of the known ones is refused by the user's."""
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if role == "developer":
        role = "system"
    return f"{TAG}{role}" if role in ("system", "assistant", "tool") else f"{TAG}user"


Message = Annotated[
    Annotated[SystemMessage, Tag(f"{TAG}system")]
    | Annotated[UserMessage, Tag(f"{TAG}user")]
    | Annotated[AssistantMessage, Tag(f"{TAG}assistant")]
    | Annotated[ToolMessage, Tag(f"{TAG}tool")],
    Discriminator(_by_role),
]
Messages = Annotated[list[Message], Within("messages")]


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, Within("function_name")]
    description: str | None = None
    parameters: JsonSchema | None = None
    """JSON schema of the arguments. It binds them where tool_choice demands the call."""
    strict: bool = False
    """Only where tool_choice demands the call: a free answer cannot be bound."""

    @model_validator(mode="after")
    def _plain_name(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise fault("use 1 to 64 of A-Z a-z 0-9 _ . -", "name")
        return self


class Tool(Strict):
    """A tool: always a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """A function by its name."""

    name: Annotated[str, Within("function_name")]


class NamedChoice(Strict):
    """The answer is a call of this function."""

    type: Literal["function"]
    function: FunctionName


def _by_choice(value: Any) -> str:
    return f"{TAG}named" if isinstance(value, dict | NamedChoice) else f"{TAG}word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(f"{TAG}word")] | Annotated[NamedChoice, Tag(f"{TAG}named")],
    Discriminator(_by_choice),
]
Tools = Annotated[list[Tool], Within("tools"), JsonWithin("tool_bytes", "tool_depth")]


class TemplateChoices(Strict):
    """What a request may choose of the chat template."""

    thinking: bool | None = None
    """Whether the model thinks first, where the template has the choice (V3.1)."""


class Conversation(Strict):
    """What is rendered into a prompt."""

    messages: Messages
    tools: Tools = Field(default_factory=list)
    chat_template_kwargs: TemplateChoices | None = None
    add_generation_prompt: bool = True
    """Ask for a new answer."""
    continue_final_message: bool = False
    """Go on with the last message, which is the assistant's; with add_generation_prompt false."""

    @model_validator(mode="after")
    def _end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise fault("only with add_generation_prompt false", "continue_final_message")
        last = self.messages[-1]
        if self.continue_final_message and not (isinstance(last, AssistantMessage) and not last.tool_calls):
            raise fault("only where the last message is a text of the assistant", "continue_final_message")
        return self

    @property
    def thinking(self) -> bool | None:
        """None: left to the server."""
        return self.chat_template_kwargs.thinking if self.chat_template_kwargs else None


class ChatRequest(Sampling, Conversation):
    """A conversation that asks for an answer."""

    HARMLESS: ClassVar = NO_EFFECT
    NEUTRAL: ClassVar = {
        **NOTHING,
        "audio": (),
        "documents": ([],),
        "chat_template": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": (),
        "include_reasoning": (True,),
        "verbosity": (),
        "web_search_options": (),
    }
    max_completion_tokens: Annotated[int, Within("max_tokens")] | None = None
    """The newer name of max_tokens."""
    logprobs: bool = False
    """Report the log-probability of each token of the answer."""
    top_logprobs: Annotated[int, Within("logprobs")] = 0
    tool_choice: ToolChoice | None = None
    """none, auto (where there are tools), required, or one function by name."""
    parallel_tool_calls: bool = True
    """False: nothing after the first tool call counts."""
    echo: bool = False
    """With continue_final_message: begin the answer with the message that it continues."""

    @model_validator(mode="after")
    def _of_chat(self) -> Self:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise fault(f"is {old}, but max_completion_tokens is {new}; give one of them", "max_tokens")
        for name, value in (("max_tokens", old), ("max_completion_tokens", new)):
            if value == 0:
                raise fault("is 0; use 1 or more", name)
        if self.top_logprobs and not self.logprobs:
            raise fault("only with logprobs true", "top_logprobs")
        if self.echo and not self.continue_final_message:
            raise fault("only with continue_final_message", "echo")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise fault("has two functions of one name", "tools")
        if self.tool_choice not in (None, "none") and not names:
            raise fault("only where there are tools", "tool_choice")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise fault("names no function of tools", "tool_choice.function.name")
        if self.calls != "none" and (forms := self.forms()):
            raise fault("not together with tools that may be called; use tool_choice none", forms[0])
        for i, tool in enumerate(self.tools):
            if tool.function.strict and self.calls == "auto":
                raise fault("only where tool_choice demands the call", f"tools[{i}].function.strict")

    @property
    def calls(self) -> str:
        """Which calls the answer may hold: none, auto, required, or named."""
        if isinstance(self.tool_choice, NamedChoice):
            return "named"
        return self.tool_choice or ("auto" if self.tools else "none")

    @property
    def most_tokens(self) -> int | None:
        """The bound of the answer's length that the client gave."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
