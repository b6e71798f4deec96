import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from benthic.base.errors import BenthicError, InputError
from benthic.inference import controls, grammar
from benthic.inference.config import EngineConfig, SamplingParams, StructuredOutputsParams
from benthic.inference.engine import Engine
from benthic.inference.grammar import LIMITS, Grammars, bitmask
from benthic.inference.request import Request, Seq
from benthic.inference.sampler import choose
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe

pytest.importorskip("xgrammar", reason="structured output needs the extra `grammar`")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
PERSON_FORM = StructuredOutputsParams(json=PERSON)
DATE = StructuredOutputsParams(regex="(19|20)[0-9]{2}-[01][0-9]")
SUM = StructuredOutputsParams(grammar='root ::= term ("+" term)*\nterm ::= [1-9] | "(" root ")"\n')
LENGTH = 160


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(['{"name": "value", "age": 12, "tags": [true, false]} 2024-12 深度 (1+2)\n' * 20], 290)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = Grammars(tokenizer, tokenizer.vocab_size)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(config, tokenizer) -> Transformer:
    c = replace(config, vocab_size=tokenizer.vocab_size + 20, max_position_embeddings=256)
    return initialise(Transformer(c), std=0.15, seed=0)


def sample(grammars, tokenizer, forms, seed: int, whole: bool = True) -> list[list[int]]:
    """Answers of rows with random logits that prefer an end, all in one batch, until they end."""
    params = [SamplingParams(structured_outputs=form, seed=seed + i, temperature=1.5) for i, form in enumerate(forms)]
    matchers = [grammars.matcher(form) for form in forms]
    seqs = [Seq(request_id=0, ids=[1], prompt_len=1, max_len=999, params=p) for p in params]
    built = controls.build(seqs, "cpu")
    generator = torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in forms]
    for place in range(LENGTH):
        logits = torch.randn(len(forms), 1, grammars.vocab_size, generator=generator) * 2
        logits[..., [tokenizer.eos_id, *tokenizer.encode('"'), *tokenizer.encode(")")]] += 4
        mask = bitmask(matchers, grammars.vocab_size)
        tokens = choose(logits, built, torch.full((len(forms),), place), grammars.vocab_size, None, mask).tokens
        for answer, matcher, token in zip(answers, matchers, tokens[:, 0].tolist()):
            if tokenizer.eos_id not in answer:
                answer.append(token)
                matcher.accept([token])
    return answers


def check_person(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "age", "kind", "tags"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert value["kind"] in ("a", "b")
    assert len(value["tags"]) <= 3
    assert all(type(tag) is bool for tag in value["tags"])


def test_every_answer_that_ends_has_the_form_it_was_asked_for(grammars, tokenizer):
    forms = [PERSON_FORM, DATE, SUM, StructuredOutputsParams(json_object=True)] * 8
    ended = [0] * 4
    for i, answer in enumerate(sample(grammars, tokenizer, forms, seed=0)):
        assert not set(answer[:-1]) & set(tokenizer.special.values())
        if answer[-1] != tokenizer.eos_id:
            continue
        text = tokenizer.bytes_of_all(answer[:-1]).decode("utf-8")
        ended[i % 4] += 1
        if i % 4 == 0:
            check_person(text)
        elif i % 4 == 1:
            assert re.fullmatch(DATE.regex, text)
        elif i % 4 == 2:
            assert re.fullmatch(r"[1-9+()]+", text)
            assert isinstance(eval(text), int)
        else:
            assert isinstance(json.loads(text), dict)
    assert min(ended) > 0
    assert ended[1] == 8


def test_a_form_binds_from_the_end_of_the_thinking_on(grammars, tokenizer):
    end = tokenizer.special["</think>"]
    matcher = grammars.matcher(replace(DATE, after_thinking=True))
    free = bitmask([matcher], grammars.vocab_size)
    allowed = [i for i in range(grammars.vocab_size) if free[0, i // 32] >> (i % 32) & 1]
    assert allowed == [i for i in range(grammars.vocab_size) if i != tokenizer.eos_id]
    matcher.accept([*tokenizer.encode("2 or {"), end])
    bound = bitmask([matcher, grammars.matcher(DATE)], grammars.vocab_size)
    assert torch.equal(bound[0], bound[1])
    assert not torch.equal(bound[0], free[0])


def test_a_token_against_the_form_is_an_error_of_the_caller(grammars, tokenizer):
    with pytest.raises(BenthicError, match="does not fit"):
        grammars.matcher(DATE).accept(tokenizer.encode("x"))


def test_a_step_too_many_changes_nothing(grammars, tokenizer):
    matcher = grammars.matcher(DATE)
    matcher.accept([*tokenizer.encode("2024-12"), tokenizer.eos_id])
    assert bool((bitmask([matcher], grammars.vocab_size) == -1).all())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (StructuredOutputsParams(json='{"type": 5}'), "cannot be used .* -> correct it"),
        (StructuredOutputsParams(json='{"type":"string","minLength":5,"maxLength":2}'), "minLength 5 is greater"),
        (StructuredOutputsParams(json={"type": "integer", "multipleOf": 2}), "'multipleOf' at #"),
        (StructuredOutputsParams(regex="(a"), "parenthesis is not closed"),
        (StructuredOutputsParams(regex="(?=a)b"), "Lookahead"),
        (StructuredOutputsParams(grammar="root ::= x"), 'Rule "x" is not defined'),
        (StructuredOutputsParams(regex="a" * 4097), "4097 characters -> give at most 4096"),
        (StructuredOutputsParams(json='"' + "a" * 65536), "65537 characters"),
    ],
)
def test_forms_that_mean_nothing_are_refused_with_the_reason(grammars, form, message):
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match=message):
            grammars.matcher(form)


def test_a_form_that_explodes_is_refused_in_time_and_the_next_one_compiles(grammars):
    parts = [{"type": "string", "pattern": f"a{{1,{i}}}"} for i in range(100, 1700)]
    bomb = StructuredOutputsParams(json={"anyOf": parts})  # within every limit of size; half a minute
    grammars.matcher(DATE)  # the compiling process has started
    begin = time.monotonic()
    for _ in range(2):
        with pytest.raises(InputError, match="takes more than 1 s"):
            grammars.matcher(bomb)
    assert time.monotonic() - begin < 2.5
    assert not grammars.matcher(replace(DATE, regex="[0-9]+")).slow


def test_compiled_forms_are_kept_up_to_a_number_of_bytes(tokenizer):
    made = Grammars(tokenizer, tokenizer.vocab_size, replace(LIMITS, cache_bytes=100_000))
    try:
        forms = [StructuredOutputsParams(regex=f"[a-z]{{1,{i}}}x") for i in range(2, 20)]
        first = made.compile(forms[0])
        assert made.compile(forms[0]) is first
        for form in forms[1:]:
            made.compile(form)
        assert 1 < len(made._kept) < len(forms)
        assert made._kept_bytes == sum(grammar._size(*entry) for entry in made._kept.items()) <= 100_000
        assert made.compile(forms[0]) is not first
    finally:
        made.close()


def test_many_threads_may_compile_at_once(grammars):
    forms, got = [StructuredOutputsParams(regex=f"b{{{i % 3 + 1}}}") for i in range(12)], {}

    def work(i: int) -> None:
        got[i] = grammars.compile(forms[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(value) for value in got.values()}) == 3


def test_a_slow_token_ends_its_request_alone(model, tokenizer, grammars):
    engine = Engine(model, tokenizer)
    engine._grammars = grammars
    slow = engine.add(Request(prompt_token_ids=[5], params=SamplingParams(max_tokens=9, structured_outputs=SUM)))
    fine = engine.add(Request(prompt_token_ids=[5], params=SamplingParams(max_tokens=9)))
    engine._matchers[slow]._seconds = 0.0
    outputs = {}
    while engine.busy:
        outputs |= {o.request_id: o.finish_reason for o in engine.step().outputs}
    assert outputs == {slow: "abort", fine: "length"}
    assert len(engine.scheduler.pool.free) == engine.config.num_pages


@pytest.mark.parametrize("limits", [{}, {"num_pages": 16, "page_size": 4, "max_num_seqs": 9}])
def test_the_engine_keeps_every_form_beside_free_rows_and_drafts(model, tokenizer, grammars, limits):
    ends = {tokenizer.eos_id: 3.0, tokenizer.encode(")")[0]: 3.0}
    forms = [StructuredOutputsParams(), DATE, SUM]
    params = [
        SamplingParams(
            max_tokens=30, seed=i, temperature=i % 2, logit_bias=ends if i % 3 else {}, structured_outputs=forms[i % 3]
        )
        for i in range(15)
    ]
    prompts = [[7 + i, 8, 9] for i in range(15)]
    engine = Engine(model, tokenizer, EngineConfig(num_speculative_tokens=2, max_model_len=40, **limits))
    engine._grammars = grammars
    outputs = engine.generate(prompts, params)
    assert engine.stats.preemptions > 0 or not limits
    assert not engine._matchers
    for i, output in enumerate(outputs):
        if i % 3 == 1:
            assert output.finish_reason == "stop"
            assert re.fullmatch(DATE.regex, output.text)
        elif i % 3 == 2 and output.finish_reason == "stop":
            assert isinstance(eval(output.text), int)
    plain = Engine(model, tokenizer)
    plain._grammars = grammars
    assert [o.token_ids for o in plain.generate(prompts, params)] == [o.token_ids for o in outputs]


def test_stop_strings_end_answers_with_drafts_as_without(model, tokenizer):
    params = [SamplingParams(max_tokens=60, seed=i, stop=("e", "12"), logprobs=1) for i in range(20)]
    prompts = [[7 + i, 8, 9] for i in range(20)]
    engines = [Engine(model, tokenizer, EngineConfig(num_speculative_tokens=k)) for k in (0, 3)]
    one, two = (engine.generate(prompts, params) for engine in engines)
    assert [(o.token_ids, o.text, o.finish_reason) for o in one] == [
        (o.token_ids, o.text, o.finish_reason) for o in two
    ]
    assert any(o.finish_reason == "stop" for o in one)
    for output in two:
        assert "e" not in output.text
        assert "12" not in output.text
        assert len(output.token_ids) == len(output.logprobs) == len(output.top_logprobs)
    assert all(len(engine.scheduler.pool.free) == engine.config.num_pages for engine in engines)


def test_ignore_eos_goes_on_and_min_tokens_puts_the_end_off(model, tokenizer):
    ends = {tokenizer.eos_id: 100.0}
    run = Engine(model, tokenizer).generate
    assert len(run([[7]], SamplingParams(max_tokens=8, logit_bias=ends))[0].token_ids) == 1
    late = run([[7]], SamplingParams(max_tokens=8, logit_bias=ends, min_tokens=4))[0]
    assert late.token_ids.index(tokenizer.eos_id) == 4
    assert late.finish_reason == "stop"
    on = run([[7]], SamplingParams(max_tokens=8, logit_bias=ends, ignore_eos=True))[0]
    assert on.token_ids == [tokenizer.eos_id] * 8


@pytest.mark.parametrize(
    "params", [SamplingParams(stop="x"), SamplingParams(structured_outputs=DATE)], ids=["stop", "form"]
)
def test_an_engine_without_tokenizer_refuses_what_needs_text(model, params):
    engine = Engine(model, None)
    with pytest.raises(InputError, match="needs a tokenizer"):
        engine.add(Request(prompt_token_ids=[1], params=params))
    assert not engine.busy


def test_a_bias_for_a_token_that_does_not_exist_is_refused(model, tokenizer):
    with pytest.raises(InputError, match=f"logit_bias has token {tokenizer.vocab_size} "):
        Engine(model, tokenizer).add(
            Request(prompt_token_ids=[1], params=SamplingParams(logit_bias={tokenizer.vocab_size: 1.0}))
        )


def test_a_missing_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InputError, match=r"pip install 'benthic\[grammar\]'"):
        Grammars(tokenizer, tokenizer.vocab_size)


def test_the_engine_imports_without_xgrammar():
    code = "import sys, benthic.inference.engine; sys.exit('xgrammar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_closed_engine_leaves_no_process(model, tokenizer):
    date = SamplingParams(max_tokens=10, structured_outputs=DATE)
    with Engine(model, tokenizer) as engine:
        assert len(engine.generate([[7]], date)[0].text) == 7
        process = engine.grammars._compiler._process
        assert process.poll() is None  # the negative control: it waits for more
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    engine.close()  # again: nothing is left to do
    assert len(engine.generate([[8]], SamplingParams(max_tokens=3))[0].token_ids) == 3


def test_a_closed_engine_starts_the_process_again_for_a_form(model, tokenizer):
    engine = Engine(model, tokenizer)
    engine.close()
    assert len(engine.generate([[7]], SamplingParams(max_tokens=10, structured_outputs=DATE))[0].text) == 7
    process = engine.grammars._compiler._process
    engine.close()
    assert process.poll() is not None
