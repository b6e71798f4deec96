"""`benthic chat`: a conversation in the terminal. Ctrl-C ends an answer; at the prompt, it ends the conversation."""

import dataclasses
import sys
from collections.abc import Iterator

from benthic.base.errors import InputError
from benthic.inference.config import SamplingParams
from benthic.inference.llm import LLM
from benthic.inference.request import Request
from benthic.jobs.config import ChatConfig
from benthic.jobs.generate import load, sampling
from benthic.tokenizer import tokens
from benthic.tokenizer.chat import check
from benthic.tokenizer.runs import Rendered
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.templates import THINKS

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "Ctrl-C stops an answer, Ctrl-C or Ctrl-D at the prompt leaves, /new starts afresh."


def run(config: ChatConfig) -> None:
    """Ask, answer, remember, until the end of standard input."""
    llm = load(config, max_num_seqs=1, chat_template=config.chat_template)
    thinking = THINKS[config.thinking]
    if llm.tokenizer is None:
        raise InputError("chat needs a tokenizer, the model folder has none -> add tokenizer.json")
    check(llm.tokenizer, thinking)
    terminal = sys.stdin.isatty()
    start = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(start)
    if terminal:
        print(HELP, file=sys.stderr)
    with llm:
        while (question := _ask(terminal)) is not None:
            if question == "/new":
                messages = list(start)
            elif question:
                messages.append({"role": "user", "content": question})
                # Each turn has its own random numbers: the same question twice may get two answers.
                params = dataclasses.replace(sampling(config), seed=config.seed + len(messages))
                content = _answer(llm, llm.prompt(messages, thinking), params)
                messages.append({"role": "assistant", "content": content})


def _ask(terminal: bool) -> str | None:
    """The next line of the user; None at the end."""
    try:
        return input("> " if terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        if terminal:
            print(file=sys.stderr)
        return None


def _answer(llm: LLM, prompt: Rendered, params: SamplingParams) -> str:
    """Print the answer as it grows, the thinking dimmed on a terminal; returns the message's content."""
    text = ""
    dim = sys.stdout.isatty()
    _show(prompt.opening if prompt.thinks else "", dim)
    try:
        for piece in stream(llm, prompt, params):
            text += piece
            _show(piece, dim)
    except KeyboardInterrupt:
        pass  # the user has read enough: what is written so far is the answer
    print(PLAIN if dim else "", flush=True)
    return prompt.content(text)


def stream(llm: LLM, prompt: Rendered, params: SamplingParams) -> Iterator[str]:
    """The answer in pieces. Thinking tokens appear as text. Closing the iterator ends the request."""
    if llm.tokenizer is None:
        raise InputError("text needs a tokenizer, the model folder has none -> add tokenizer.json")
    text = TextStream(llm.tokenizer)
    request = llm.engine.add(Request(prompt_token_ids=prompt.ids, params=params))
    try:
        while llm.engine.busy:
            for delta in llm.engine.step().deltas:
                yield text.feed(token for token in delta.token_ids if token != llm.tokenizer.eos_id)
        yield text.finish()
    finally:
        llm.engine.abort(request)
        while llm.engine.busy:
            llm.engine.step()


def _show(piece: str, dim: bool) -> None:
    """Print; dimmed, thinking starts dim and ends plain. Its tags are single tokens, so they are never cut."""
    if dim:
        piece = piece.replace(tokens.THINK, DIM + tokens.THINK).replace(tokens.END_THINK, tokens.END_THINK + PLAIN)
    print(piece, end="", flush=True)
