"""`benthic generate`: the engine's answers, in order, as text or lines; bad lines never reach a model."""

import io
import json
import math
import sys

import pytest

from benthic import cli
from benthic.inference.config import SamplingParams
from benthic.inference.llm import LLM
from benthic.jobs import generate

MESSAGES = [{"role": "user", "content": "How many are 2 and 3?"}]


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder, device="cpu")


@pytest.fixture
def ask(model_folder, capsys):
    """Runs the verb on the small model; returns (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main(["generate", str(model_folder), "--device", "cpu", "--max-tokens", "5", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def lines(path, *rows: object) -> str:
    """A file of JSON lines; rows that are text already are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def test_it_prints_each_prompt_with_its_continuation(ask, llm):
    code, out, _ = ask("The sea", "2 and 3", "--seed", 4)
    prompts, seeds = ("The sea", "2 and 3"), (4, generate.prompt_seed(4, 1))
    params = [SamplingParams(max_tokens=5, temperature=0.6, top_p=0.95, seed=seed) for seed in seeds]
    texts = [llm.generate(prompt, one)[0].text for prompt, one in zip(prompts, params)]
    assert code == 0
    assert out == f"The sea{texts[0]}\n\n2 and 3{texts[1]}\n"


def test_it_reads_standard_input_without_a_prompt(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea"))
    assert ask()[1].startswith("The sea")


def test_lines_come_back_in_order_with_their_keys_and_the_engines_answer(ask, llm, tmp_path):
    rows = [
        {"prompt": "The sea 深", "id": 7},
        {"messages": MESSAGES, "tags": ["a"]},
        {"prompt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12]},
    ]
    code, out, _ = ask("--input", lines(tmp_path / "in.jsonl", rows[0], "", *rows[1:]), "--json", "--temperature", 0)
    found = [json.loads(line) for line in out.splitlines()]
    params = SamplingParams(max_tokens=5, temperature=0)
    expected = [
        llm.generate("The sea 深", params)[0],
        llm.chat(MESSAGES, params)[0],
        llm.generate([rows[2]["prompt_token_ids"]], params)[0],
    ]
    assert code == 0
    for row, line, output in zip(rows, found, expected, strict=True):
        assert {key: line.pop(key) for key in row} == row
        assert line.pop("logprob") == pytest.approx(math.fsum(output.logprobs), abs=1e-4)
        assert line == {"text": output.text, "token_ids": output.token_ids, "finish_reason": output.finish_reason}


def test_the_output_file_holds_what_is_printed_and_takes_the_place_of_text(ask, tmp_path):
    question = lines(tmp_path / "in.jsonl", {"prompt": "The sea"})
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    assert ask("--input", question, "--output", path)[:2] == (0, "")
    alone = path.read_text("utf-8")
    code, out, _ = ask("--input", question, "--output", path, "--json")
    assert (code, out, path.read_text("utf-8")) == (0, alone, alone)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_equal_prompts_and_their_samples_all_get_different_answers_that_the_seed_repeats(ask):
    words = ["sea"] * 3 + ["--n", 3, "--json", "--temperature", 5, "--top-p", 1, "--max-tokens", 8]
    first, again, other = ask(*words)[1], ask(*words)[1], ask(*words, "--seed", 1)[1]
    assert len({tuple(json.loads(line)["token_ids"]) for line in first.splitlines()}) == 9
    assert again == first
    assert other != first


def test_no_seed_of_a_prompt_is_that_of_a_sample_of_another():
    seeds = [
        one.seed for place in range(20) for one in SamplingParams(n=20, seed=generate.prompt_seed(3, place)).samples()
    ]
    assert len(set(seeds)) == 400
    assert seeds[0] == 3


def test_sampling_flags_reach_the_engine(ask, llm):
    greedy = llm.generate("The sea", SamplingParams(max_tokens=5, temperature=0))[0]
    for words in (["--top-k", 1], ["--min-p", 1]):
        assert json.loads(ask("The sea", "--json", "--temperature", 9, *words)[1])["token_ids"] == greedy.token_ids
    stop = greedy.text[1:3]
    row = json.loads(ask("--stop", "never there", "--stop", stop, "--temperature", 0, "--json", "The sea")[1])
    assert (row["text"], row["finish_reason"]) == (greedy.text.partition(stop)[0], "stop")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "no JSON"),
        ('{"prompt": "a", "score": NaN}', "no JSON"),
        (r'{"prompt": "a", "id": "\ud800"}', "no JSON"),
        ("[1]", "no object"),
        ({"text": "The sea"}, "the key 'text' is where the answer goes"),
        ({"question": "The sea"}, "no prompt -> give one of prompt, messages, prompt_token_ids"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt and messages -> give one"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "prompt=3 is no text"),
        ({"prompt": "the sea is deep. " * 80}, "use at most 255"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages='hello' is no list"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role is 'usr' in messages[0]"),
        ({"prompt_token_ids": []}, "at least one token id"),
        ({"prompt_token_ids": [1, True]}, "True in prompt_token_ids"),
        ({"prompt_token_ids": [1, 300]}, "300 in prompt_token_ids -> use integers from 0 to 299"),
    ],
    ids=str,
)
def test_a_bad_line_is_refused_by_file_and_number_before_weights_are_read(ask, tmp_path, monkeypatch, row, problem):
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    path = lines(tmp_path / "in.jsonl", {"prompt": "fine"}, "", row)
    code, _, err = ask("--input", path)
    assert code == 2
    assert f"{path}:3: " in err
    assert problem in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["--input", "nowhere.jsonl", "a prompt"], "1 prompts beside --input"),
        (["a prompt", "--output", "nowhere/out.jsonl"], "cannot be written"),
        (["a prompt", "--output", "."], "cannot be written"),
        (["a prompt", ""], "prompt 2: the prompt is empty"),
        (["a prompt", "--n", 0], "n=0"),
        (["a prompt", "--min-p", 2], "min_p=2"),
    ],
    ids=str,
)
def test_other_mistakes_are_refused_before_weights_are_read(ask, monkeypatch, words, problem):
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    code, _, err = ask(*words)
    assert (code, problem in err) == (2, True)


def test_an_input_without_lines_is_refused(ask, tmp_path):
    code, _, err = ask("--input", lines(tmp_path / "in.jsonl", "", " "))
    assert (code, "is empty" in err) == (2, True)


def test_a_folder_without_a_tokenizer_takes_token_ids_only(model_folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model_folder / name)
    words = ["generate", str(tmp_path), "--device", "cpu", "--max-tokens", "2", "--json", "--input"]
    assert cli.main([*words, lines(tmp_path / "ids.jsonl", {"prompt_token_ids": [5, 6]})]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 2
    assert cli.main([*words, lines(tmp_path / "text.jsonl", {"prompt": "The sea"})]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
