"""`benthic generate`: continue prompts."""

import sys

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.llm import LLM
from benthic.jobs.config import AnswerConfig, GenerateConfig


def run(config: GenerateConfig) -> None:
    """Print prompt and continuation of each prompt, with a blank line between two."""
    prompts = list(config.prompts) or [sys.stdin.read()]
    if not all(prompts):
        raise InputError("a prompt is empty -> give some text, as arguments or on standard input")
    llm = load(config, max_num_seqs=min(len(prompts), EngineConfig().max_num_seqs))
    for i, (prompt, output) in enumerate(zip(prompts, llm.generate(prompts, sampling(config)))):
        print("\n" * (i > 0) + prompt + output.text)


def load(config: AnswerConfig, max_num_seqs: int, chat_template: str = "") -> LLM:
    """The model that the options name, with room for so many requests at once."""
    engine = EngineConfig(max_num_seqs=max_num_seqs)
    return LLM(config.model, device=config.device, dtype=config.dtype, chat_template=chat_template, config=engine)


def sampling(config: AnswerConfig) -> SamplingParams:
    """The options as the engine takes them."""
    return SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, top_p=config.top_p, seed=config.seed
    )
