"""Generate from a model folder in one call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output
from benthic.inference.share import join, ranks_of
from benthic.model.hf import load
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import Ranks
from benthic.tokenizer import chat
from benthic.tokenizer.runs import Rendered
from benthic.tokenizer.tokenizer import Tokenizer

ALONE = ParallelConfig(tensor_parallel_size=1)


class LLM:
    """A model and its tokenizer from a folder in the Hugging Face layout, ready to generate.

    `chat_template` replaces the folder's own: a name (v1, v2, v3, r1, v3.1) or the path of a Jinja file. One that the
    tokenizer cannot render is an InputError before the weights are read.

    `parallel` shares the model among the processes that torchrun started. Rank 0 generates and closes at the end; the
    others only `follow`:

        llm = LLM(path, parallel=ParallelConfig())
        if llm.rank:
            llm.follow()
        else:
            llm.generate(...)
            llm.close()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        chat_template: str | Path = "",
        config: EngineConfig | None = None,
        parallel: ParallelConfig = ALONE,
    ):
        chosen = None
        if chat_template:
            chosen = Tokenizer.load(path).with_template(chat_template)
            chat.check(chosen)
        config = config or EngineConfig()
        part = join(parallel, device)
        model, own = load(path, device=device, dtype=dtype, quantization=config.quantization, part=part)
        self.tokenizer = chosen or own
        self.engine = Engine(model, self.tokenizer, config)
        self._ranks = ranks_of(model)

    @property
    def rank(self) -> int:
        """Number of this process among those that share the model; 0 generates."""
        return self._ranks.rank

    def follow(self) -> None:
        """On a rank that is not 0: compute what rank 0 asks for, until it closes."""
        self.engine.follow()
        self._leave()

    def close(self) -> None:
        """End what runs beside this process (see `Engine.close`), and let the other processes of a shared model go;
        `with LLM(...) as llm` does so too."""
        self.engine.close()
        self._leave()

    def _leave(self) -> None:
        if isinstance(self._ranks, Ranks):
            self._ranks.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[Output]:
        """Continue each prompt; the n samples of one prompt stand together. `params` for all, or one per prompt.

        Text gets the begin-of-sentence token first, as in training; token ids are taken as they are.
        """
        many: list[Any] = [prompts] if isinstance(prompts, str) else prompts
        return self.engine.generate([self._ids(prompt) for prompt in many], params or SamplingParams())

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        params: SamplingParams | list[SamplingParams] | None = None,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[Output]:
        """Answer one conversation or several, each a list of {"role": ..., "content": ...}.

        `thinking` says whether to think first, where the chat template has the choice (V3.1); None is its own way.
        `tools` are declared to the model, as OpenAI's; `tool_calls.ToolCallReader` finds its calls in the answer. In
        the next turn, the answer is a message of content `llm.prompt(messages, thinking).content(output.text)`.
        """
        many: list[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        prompts = [self.prompt(one, thinking, tools).ids for one in many]
        return self.engine.generate(prompts, params or SamplingParams())

    def prompt(
        self, messages: list[dict[str, str]], thinking: bool | None = None, tools: Sequence[dict[str, Any]] = ()
    ) -> Rendered:
        """What `chat` gives to the model for one conversation, and how the answer to it begins."""
        return chat.render(messages, self._need_tokenizer("chat()"), True, thinking, tools)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self._need_tokenizer("a text prompt")
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{what} needs a tokenizer, the model folder has none -> give lists of token ids")
        return self.tokenizer
