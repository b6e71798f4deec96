"""What the routes share: the model's name, its tokenizer and its worker."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benthic.base.errors import InputError
from benthic.inference.config import StructuredOutputsParams
from benthic.server.errors import ApiError
from benthic.server.worker import Worker
from benthic.tokenizer.tokenizer import Tokenizer

Check = Callable[[StructuredOutputsParams], object]


class Forms:
    """Compiles the forms of answers ahead of the engine, in a thread of its own, so that no step waits for it."""

    def __init__(self, check: Check | None = None):
        """`check` raises InputError for a form that cannot be used; None leaves it to the engine."""
        self._check = check
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="benthic-forms")  # starts a thread at first use

    async def check(self, form: StructuredOutputsParams, param: str) -> None:
        """Compile `form`. ApiError 400 naming `param` where it cannot be used."""
        if self._check is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._check, form)
        except InputError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from error

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model."""

    name: str
    """As clients see it."""
    tokenizer: Tokenizer
    worker: Worker
    max_model_len: int
    """Most tokens of prompt and answer together."""
    vocab_size: int = 0
    """Token ids that the engine takes are below it; 0 takes the tokenizer's."""
    thinking: bool | None = None
    """Whether the model thinks where a request leaves it open; None: the chat template's own way."""
    forms: Forms = field(default_factory=Forms)
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def check_model(self, model: str | None) -> None:
        """ApiError 404 for a model that is not served."""
        if model not in (None, self.name):
            message = f"the model {model[:64]!r} does not exist -> use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ids(self, ids: list[int], param: str) -> None:
        """ApiError 400 for ids outside the vocabulary."""
        size = self.vocab_size or self.tokenizer.vocab_size
        if ids and max(ids) >= size:
            raise ApiError(400, f"{param}: holds {max(ids)}, the vocabulary ends at {size - 1}", param=param)
