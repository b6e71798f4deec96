"""Generate from a model folder in one call."""

from pathlib import Path
from typing import Any, Literal

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output
from benthic.model.hf import load
from benthic.tokenizer import chat
from benthic.tokenizer.tokenizer import Tokenizer


class LLM:
    """A model and its tokenizer from a folder in the Hugging Face layout, ready to generate."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        config: EngineConfig | None = None,
    ):
        model, self.tokenizer = load(path, device=device, dtype=dtype)
        self.engine = Engine(model, self.tokenizer, config)

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
    ) -> list[Output]:
        """Answer one conversation or several, each a list of {"role": ..., "content": ...}."""
        many: list[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        tokenizer = self._need_tokenizer("chat()")
        prompts = [chat.render(one, tokenizer, add_generation_prompt=True).ids for one in many]
        return self.engine.generate(prompts, params or SamplingParams())

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self._need_tokenizer("a text prompt")
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{what} needs a tokenizer, the model folder has none -> give lists of token ids")
        return self.tokenizer
