"""`benthic chat`: the same answers as the engine, as they grow, and a Ctrl-C that only stops."""

import itertools
import sys

import pytest

from benthic import cli
from benthic.inference.config import SamplingParams
from benthic.inference.llm import LLM
from benthic.jobs import chat, generate
from benthic.jobs.config import ChatConfig

PARAMS = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
ASK = [{"role": "user", "content": "How many are 2 and 3?"}]


@pytest.fixture
def llm(model_folder):
    return generate.load(ChatConfig(model=str(model_folder), device="cpu"), max_num_seqs=1)


def test_the_streamed_pieces_joined_are_the_answer_of_the_engine(llm):
    whole = llm.chat(ASK, PARAMS)[0]
    answer = [token for token in whole.token_ids if token != llm.tokenizer.eos_id]
    assert "".join(chat.stream(llm, llm.prompt(ASK), PARAMS)) == llm.tokenizer.decode(answer)


def test_leaving_an_answer_early_frees_the_engine_for_the_next(llm):
    prompt = llm.prompt(ASK)
    expected = list(chat.stream(llm, prompt, PARAMS))
    started = chat.stream(llm, prompt, PARAMS)
    next(started)
    assert llm.engine.busy
    started.close()
    assert not llm.engine.busy
    assert list(chat.stream(llm, prompt, PARAMS)) == expected


def _type(monkeypatch, *lines):
    """Lines of the user; an exception is raised instead of being typed."""
    typed = itertools.chain(lines, itertools.repeat(EOFError()))

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def _record(monkeypatch, answer):
    """Replace the model by `answer(messages)`; returns the conversations that it was shown, and its seeds."""
    seen, render = [], LLM.prompt

    def prompt(llm, messages, thinking):
        seen.append([(m["role"], m["content"]) for m in messages])
        return render(llm, messages, thinking)

    def stream(llm, prompt, params):
        seen[-1] = (seen[-1], params.seed)
        yield from answer(seen[-1][0])

    monkeypatch.setattr(LLM, "prompt", prompt)
    monkeypatch.setattr(chat, "stream", stream)
    return seen


def test_the_conversation_is_remembered_until_new(model_folder, monkeypatch, capsys):
    seen = _record(monkeypatch, lambda messages: ["five", "."])
    _type(monkeypatch, "one", "", "two", "/new", "three")
    assert cli.main(["chat", str(model_folder), "--system", "Be brief.", "--device", "cpu"]) == 0
    system, one, two = ("system", "Be brief."), ("user", "one"), ("user", "two")
    conversations = [conversation for conversation, _ in seen]
    assert conversations == [
        [system, one],
        [system, one, ("assistant", "five."), two],
        [system, ("user", "three")],
    ]
    assert seen[0][1] != seen[1][1]
    assert capsys.readouterr().out == "five.\n" * 3


def test_ctrl_c_stops_the_answer_and_a_second_one_at_the_prompt_leaves(model_folder, monkeypatch, capsys):
    def answer(messages):
        yield "half an "
        raise KeyboardInterrupt

    seen = _record(monkeypatch, answer)
    _type(monkeypatch, "one", "two", KeyboardInterrupt(), "never read")
    assert cli.main(["chat", str(model_folder), "--device", "cpu"]) == 0
    assert len(seen) == 2
    assert seen[1][0][1] == ("assistant", "half an ")
    assert capsys.readouterr().out == "half an \n" * 2


def test_thinking_is_dim_on_a_terminal_only(model_folder, monkeypatch, capsys):
    _record(monkeypatch, lambda messages: ["<think>", "hm", "</think>", "5"])
    _type(monkeypatch, "one")
    cli.main(["chat", str(model_folder), "--device", "cpu"])
    assert capsys.readouterr().out == "<think>hm</think>5\n"
    _type(monkeypatch, "one")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["chat", str(model_folder), "--device", "cpu"])
    assert capsys.readouterr().out == "\x1b[2m<think>hm</think>\x1b[0m5\x1b[0m\n"


def test_thinking_that_the_prompt_begins_is_shown_and_remembered(model_folder, monkeypatch, capsys):
    """R1 is asked with `<think>`, which is not in what it generates."""
    seen = _record(monkeypatch, lambda messages: ["hm", "</think>", "5"])
    _type(monkeypatch, "one", "two")
    assert cli.main(["chat", str(model_folder), "--device", "cpu", "--chat-template", "r1"]) == 0
    assert capsys.readouterr().out == "<think>\nhm</think>5\n" * 2
    assert seen[1][0][1] == ("assistant", "<think>\nhm</think>5")


def test_the_blank_before_an_answer_of_v1_is_not_remembered_twice(model_folder, monkeypatch):
    seen = _record(monkeypatch, lambda messages: [" 5"])
    _type(monkeypatch, "one", "two")
    assert cli.main(["chat", str(model_folder), "--device", "cpu", "--chat-template", "v1"]) == 0
    assert seen[1][0][1] == ("assistant", "5")


@pytest.mark.parametrize(("thinking", "opening"), [("on", "<think>"), ("off", "</think>"), ("auto", "</think>")])
def test_thinking_is_chosen_by_a_flag(model_folder, monkeypatch, thinking, opening):
    asked = []
    monkeypatch.setattr(chat, "stream", lambda llm, prompt, params: asked.append(prompt.opening) or iter(["5"]))
    _type(monkeypatch, "one")
    words = ["chat", str(model_folder), "--device", "cpu", "--chat-template", "v3.1", "--thinking", thinking]
    assert cli.main(words) == 0
    assert asked == [opening]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--chat-template", "v3.2"], "unknown template 'v3.2', and no such file"),
        (["--chat-template", "v3", "--thinking", "on"], "thinking=True is not a choice in template 'v3'"),
        (["--chat-template", "r1", "--thinking", "off"], "thinking=False is not a choice in template 'r1'"),
        (["--thinking", "maybe"], "--thinking"),
    ],
)
def test_a_choice_that_the_model_has_not_ends_before_the_first_question(model_folder, capsys, words, problem):
    assert cli.main(["chat", str(model_folder), "--device", "cpu", *words]) == 2
    assert problem in capsys.readouterr().err


def test_a_missing_folder_is_a_usage_error(model_folder, capsys):
    assert cli.main(["chat", str(model_folder / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
