"""What requests for chat and for plain completions have in common: how the answer is sampled, ended and reported."""

from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Le
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from benthic.server.limits import LIMITS
from benthic.server.types.base import TAG, JsonSchema, Strict, Within, fault

NO_EFFECT = {
    "user": "who asks",
    "metadata": "kept by the client",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "safety_identifier": "who asks",
    "prompt_cache_key": "every prefix is looked up",
    "prompt_cache_retention": "prefixes are kept while there is room",
    "prompt_cache_options": "every prefix is looked up",
}
NOTHING: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Within("stop_characters")]
StopStrings = Annotated[list[StopString], Within("stop")]
Stop = Annotated[StopStrings, BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings)]
TokenId = Annotated[int, Ge(int(LIMITS["token"].low)), Le(int(LIMITS["token"].high))]  # there are many: in Rust
Bias = Annotated[float, Within("bias")]


class StreamOptions(Strict):
    """How a stream is sent."""

    HARMLESS: ClassVar = {"include_obfuscation": "pieces are never padded"}
    include_usage: bool = False
    """Whether the last chunk tells the token counts."""


class TextFormat(Strict):
    """Any text. A type that is none of the three is refused here."""

    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def _one_of_three(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "text":
            raise fault("not 'text', 'json_object' or 'json_schema'", "type")
        return value


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema. It is always enforced, whatever `strict` says."""

    HARMLESS: ClassVar = {"description": "the schema alone binds the answer"}
    name: Annotated[str, Within("function_name")]
    schema_: JsonSchema = Field(alias="schema")
    strict: bool = True


class JsonSchemaFormat(Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _by_type(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{TAG}{kind}" if kind in ("json_object", "json_schema") else f"{TAG}text"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(f"{TAG}text")]
    | Annotated[JsonObjectFormat, Tag(f"{TAG}json_object")]
    | Annotated[JsonSchemaFormat, Tag(f"{TAG}json_schema")],
    Discriminator(_by_type),
]
Choices = Annotated[
    list[Annotated[str, Within("choice_characters")]],
    Within("choice"),
]
Grammar = Annotated[str, Within("grammar")]
Regex = Annotated[str, Within("regex")]


class StructuredOutputs(Strict):
    """The form of the answer in vLLM's words; one of them."""

    NEUTRAL: ClassVar = {
        "structural_tag": (),
        "disable_fallback": (False,),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
    }
    json_: JsonSchema | None = Field(default=None, alias="json")
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.given()) != 1:
            raise fault("give one of json, regex, choice, grammar, json_object")
        return self

    def given(self) -> list[str]:
        """Names of what is asked for."""
        named = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        names = [name for name, value in named.items() if value is not None]
        return [*names, "json_object"] if self.json_object else names


class Sampling(Strict):
    """Fields of every request that generates."""

    HARMLESS: ClassVar = NO_EFFECT
    NEUTRAL: ClassVar = NOTHING
    model: Annotated[str, Within("model")]
    """Name of the served model, see /v1/models."""
    stream: bool = False
    """Send the answer in server-sent events while it is made."""
    stream_options: StreamOptions | None = None
    n: Annotated[int, Within("n")] = 1
    max_tokens: Annotated[int, Within("max_tokens")] | None = None
    min_tokens: Annotated[int, Within("min_tokens")] = 0
    temperature: Annotated[float, Within("temperature")] = 1.0
    top_p: Annotated[float, Within("top_p")] = 1.0
    top_k: Annotated[int, Within("top_k")] = 0
    min_p: Annotated[float, Within("min_p")] = 0.0
    presence_penalty: Annotated[float, Within("presence_penalty")] = 0.0
    frequency_penalty: Annotated[float, Within("frequency_penalty")] = 0.0
    repetition_penalty: Annotated[float, Within("repetition_penalty")] = 1.0
    logit_bias: Annotated[dict[str, Bias], Within("logit_bias")] = Field(default_factory=dict)
    """{token id as text: bias}."""
    seed: Annotated[int, Within("seed")] | None = None
    """Drawn anew where it is absent."""
    stop: Stop = Field(default_factory=list)
    """The answer ends before the first of these texts."""
    include_stop_str_in_output: bool = False
    stop_token_ids: Annotated[list[TokenId], Within("stop_token_ids")] = Field(default_factory=list)
    ignore_eos: bool = False
    """Go on after the end of sentence."""
    skip_special_tokens: bool = True
    """Leave control tokens, such as the end of sentence, out of the text."""
    prompt_logprobs: Annotated[int, Within("prompt_logprobs")] | None = None
    return_tokens_as_token_ids: bool = False
    """Write tokens as `token_id:N` in log-probabilities."""
    timeout: Annotated[float, Within("timeout")] | None = None
    priority: Annotated[int, Within("priority")] = 0
    cache_salt: Annotated[str, Within("cache_salt")] | None = None
    """Computed prefixes are shared only among requests with the same salt."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        """What single fields cannot say."""
        if self.stream_options is not None and not self.stream:
            raise fault("only allowed when stream is true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise fault("not in a stream; leave out one of the two", "prompt_logprobs")
        for token in self.logit_bias:
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise fault("has a key that is no token id; use whole numbers as text", "logit_bias")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise fault(f"is {self.min_tokens}, but max_tokens is {self.max_tokens}", "min_tokens")
        forms = self.forms()
        if len(forms) > 1:
            raise fault(f"{forms[0]} asks for a form of the answer too; give one of them", forms[1])
        for name in ("min_tokens", "ignore_eos"):
            if forms and getattr(self, name):
                raise fault(f"not together with {forms[0]}: a whole form must be able to end", name)
        return self

    def forms(self) -> list[str]:
        """Names of the fields that bind the form of the answer."""
        names = ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"]
        given = [name for name in names if getattr(self, name) is not None]
        free = self.response_format is None or self.response_format.type == "text"
        return given if free else ["response_format", *given]
