"""`benthic generate`: continue prompts, many in one batch."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from benthic.base.errors import InputError
from benthic.base.files import write_atomic
from benthic.base.log import progress
from benthic.base.signals import leave_to_rank_0
from benthic.inference.config import EngineConfig, SamplingParams, sample_seed
from benthic.inference.llm import ALONE, LLM
from benthic.inference.request import Output
from benthic.jobs.config import AnswerConfig, GenerateConfig
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import follows
from benthic.tokenizer import chat
from benthic.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("benthic")
PROMPTS = ("prompt", "messages", "prompt_token_ids")  # a line has one of these keys,
ANSWER = ("text", "token_ids", "finish_reason", "logprob")  # and gets all of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What is asked, as it came in, and where it stood."""

    where: str
    data: dict[str, Any]


def run(config: GenerateConfig) -> None:
    """Answer every prompt, in the order in which they came, the samples of one prompt together.

    What is wrong with a prompt is an InputError that says where it stands, before the weights are read. Of processes
    that share the model, rank 0 reads and writes.
    """
    if follows(config.parallel):
        leave_to_rank_0()
        load(config, max_num_seqs=1, parallel=config.parallel).follow()
        return
    more = {"n": config.n, "stop": config.stop, "top_k": config.top_k, "min_p": config.min_p}
    params = dataclasses.replace(sampling(config), **more)
    lines = _lines(config)
    _check_output(config.output)
    shape = hf.read_config(Path(config.model))
    ids = _Prompts(Path(config.model), shape).ids(lines)
    longest = max(map(len, ids)) + config.max_tokens + EngineConfig.page_size  # a page to spare lets all run at once
    llm = load(
        config,
        max_num_seqs=min(len(ids) * config.n, EngineConfig.max_num_seqs),
        max_model_len=min(longest, shape.max_position_embeddings),
        parallel=config.parallel,
    )
    each = [dataclasses.replace(params, seed=prompt_seed(config.seed, place)) for place in range(len(ids))]
    with llm, progress("generate", len(ids) * config.n) as shown:
        outputs = llm.engine.generate(ids, each, lambda done, total: shown.update(done))
    _deliver(config, [line for line in lines for _ in range(config.n)], outputs)


def load(
    config: AnswerConfig, max_num_seqs: int, chat_template: str = "", max_model_len: int = 0,
    parallel: ParallelConfig = ALONE,
) -> LLM:  # fmt: skip
    """The model that the options name, with room for so many requests at once."""
    engine = EngineConfig(
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, quantization=config.quantization
    )  # fmt: skip
    return LLM(
        config.model, device=config.device, dtype=config.dtype, chat_template=chat_template, config=engine,
        parallel=parallel,
    )  # fmt: skip


def sampling(config: AnswerConfig) -> SamplingParams:
    """The options as the engine takes them."""
    return SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
    )


def prompt_seed(seed: int, place: int) -> int:
    """Seed of the prompt that stands in this place, so that equal prompts get different answers. The first keeps
    `seed`. Places count downwards, because `sample_seed(seed, k)` is that of sample k of the first prompt."""
    return sample_seed(seed, -place)


def _lines(config: GenerateConfig) -> list[Line]:
    """The prompts that the options name."""
    if config.input is None:
        texts = config.prompts or (sys.stdin.read(),)
        return [Line(where=f"prompt {i}", data={"prompt": text}) for i, text in enumerate(texts, 1)]
    if config.prompts:
        raise InputError(f"{len(config.prompts)} prompts beside --input {config.input} -> give one or the other")
    if not config.input.is_file():
        raise InputError(f"--input {config.input} is no file -> give a file of JSON lines")
    found = enumerate(config.input.read_bytes().splitlines(), 1)
    lines = [_line(f"{config.input}:{number}", text) for number, text in found if text.strip()]
    if not lines:
        raise InputError(f"--input {config.input} is empty -> give at least one line")
    return lines


def _line(where: str, text: bytes) -> Line:
    try:
        data = json.loads(text)
        _json(data)  # what is kept can be written again
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON in UTF-8 ({error}) -> write one object per line") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: {data!r:.40} is no object -> write one object per line")
    if taken := [key for key in ANSWER if key in data]:
        raise InputError(f"{where}: the key {taken[0]!r} is where the answer goes -> rename it")
    return Line(where=where, data=data)


def _check_output(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"--output {path} cannot be written -> give a file in a folder that exists")


class _Prompts:
    """Turns lines into ids, with what the model's folder says and without its weights."""

    def __init__(self, folder: Path, shape: ModelConfig):
        self.folder, self.longest = folder, shape.max_position_embeddings - 1
        self.tokenizer = Tokenizer.load(folder) if (folder / hf.VOCABULARY).is_file() else None
        self.vocab_size = min(shape.vocab_size, shape.vocab_size if not self.tokenizer else self.tokenizer.vocab_size)

    def ids(self, lines: list[Line]) -> list[list[int]]:
        """Ids of each line. Text gets the begin-of-sentence token first; messages are rendered as `LLM.prompt` does."""
        found = []
        for line in lines:
            try:
                found.append(self._checked(self._of(line.data)))
            except InputError as error:
                raise InputError(f"{line.where}: {error}") from error
        return found

    def _of(self, data: dict[str, Any]) -> Any:
        given = [key for key in PROMPTS if key in data]
        if len(given) != 1:
            raise InputError(f"{' and '.join(given) or 'no prompt'} -> give one of {', '.join(PROMPTS)}")
        value = data[given[0]]
        if given == ["prompt_token_ids"]:
            return value
        if self.tokenizer is None:
            raise InputError(f"{self.folder} has no tokenizer, {given[0]} needs one -> give prompt_token_ids")
        if given == ["messages"]:
            if not isinstance(value, list):
                raise InputError(f"messages={value!r:.40} is no list -> give a list of objects with role and content")
            return chat.render(value, self.tokenizer, add_generation_prompt=True).ids
        if not isinstance(value, str):
            raise InputError(f"prompt={value!r:.40} is no text -> give a string")
        if not value:
            raise InputError("the prompt is empty -> give some text")
        return [self.tokenizer.bos_id, *self.tokenizer.encode(value)]

    def _checked(self, ids: Any) -> list[int]:
        if not isinstance(ids, list) or not ids:
            raise InputError(f"prompt_token_ids={ids!r:.40} -> give a list with at least one token id")
        if bad := [token for token in ids if type(token) is not int or not 0 <= token < self.vocab_size]:
            raise InputError(f"{bad[0]!r} in prompt_token_ids -> use integers from 0 to {self.vocab_size - 1}")
        if len(ids) > self.longest:
            raise InputError(f"the prompt has {len(ids)} tokens -> use at most {self.longest}")
        return ids


def _deliver(config: GenerateConfig, lines: list[Line], outputs: list[Output]) -> None:
    """Write and print what the options ask for; text where they ask for nothing."""
    if config.output is None and not config.json:
        for i, (line, output) in enumerate(zip(lines, outputs)):
            print("\n" * (i > 0) + line.data.get("prompt", "") + output.text)
        return
    rows = [
        line.data
        | {
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "logprob": sum(output.logprobs),
        }
        for line, output in zip(lines, outputs)
    ]
    if config.output is not None:
        write_atomic(config.output, b"".join(_json(row) + b"\n" for row in rows))
        log.info("%d answers in %s", len(rows), config.output)
    if config.json:
        for row in rows:
            print(_json(row).decode())


def _json(value: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
