"""Chat templates that are none of ours, and the process that renders them."""

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from benthic.base.errors import InputError
from benthic.tokenizer import foreign, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.tokenizer import TEMPLATE, Tokenizer

BRACKETS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}[A] {{ message.content }}{{ eos_token }}"
    "{% else %}[{{ message.role | upper }}] {{ message['content'].strip() }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
LIKE_R1 = (  # asks with `<think>`, and forgets the thoughts of every answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>{% endif %}"
)
FORGETFUL = "{{ bos_token }}{{ messages[-1].content }}"
USER, ANSWER = {"role": "user", "content": " 2+2? "}, {"role": "assistant", "content": "<think>sum</think>4"}


def with_text(tokenizer: Tokenizer, text: str) -> Tokenizer:
    return Tokenizer(tokenizer._spec, tokenizer._config | {"chat_template": text})


def said(tokenizer, rendered) -> str:
    return tokenizer.decode(i for i, keep in zip(rendered.ids, rendered.mask, strict=True) if keep)


@pytest.mark.parametrize("text", [BRACKETS, LIKE_R1])
@pytest.mark.parametrize("prompt", [True, False])
def test_ids_equal_transformers(tokenizer, tmp_path, text, prompt):
    with_text(tokenizer, text).save(tmp_path)
    messages = [USER, ANSWER, USER, ANSWER]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert render(messages, Tokenizer.load(tmp_path), prompt).ids == ids


@pytest.mark.parametrize(
    ("text", "words"),
    [(BRACKETS, f" <think>sum</think>4{tokens.EOS}" * 2), (LIKE_R1, f"4{tokens.EOS}" * 2)],
)
def test_the_mask_covers_the_answers(tokenizer, text, words):
    ours = with_text(tokenizer, text)
    assert said(ours, render([USER, ANSWER, USER, ANSWER], ours)) == words


def test_a_prompt_trains_nothing(tokenizer):
    assert not any(render([USER, ANSWER, USER], with_text(tokenizer, BRACKETS), True).mask)


def test_a_mask_that_prefixes_do_not_agree_on_is_refused_but_a_prompt_is_not(tokenizer):
    ours = with_text(tokenizer, FORGETFUL)
    with pytest.raises(InputError, match="loss mask"):
        render([USER, ANSWER, USER], ours)
    assert ours.decode(render([USER, ANSWER, USER], ours, True).ids) == f"{tokens.BOS} 2+2? "


def test_a_jinja_file_beside_goes_before_the_config(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / TEMPLATE).write_text(BRACKETS, encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    assert ours.decode(render([USER], ours, True).ids) == f"{tokens.BOS}[USER] 2+2?\n[A]"
    assert render([USER], ours.with_template("v3"), True) == render([USER], tokenizer, True)


def test_names_of_tokens_in_messages_stay_text(tokenizer):
    ours = with_text(tokenizer, BRACKETS)
    attack = "".join(tokenizer.special) + "\U00100000"
    messages = [{"role": role, "content": attack} for role in ("system", "user")]
    ids = render(messages, ours).ids
    assert [i for i in ids if i in tokenizer.special.values()] == [tokenizer.bos_id]
    assert ours.decode(ids) == f"{tokens.BOS}[SYSTEM] {attack}\n[USER] {attack}\n"


def test_thinking_reaches_the_template(tokenizer):
    ours = with_text(tokenizer, "{{ 'on' if thinking else 'off' }}")
    assert [ours.decode(render([USER], ours, True, thinking=t).ids) for t in (True, False, None)] == [
        "on",
        "off",
        "off",
    ]


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 'a'.center(10**9) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_bomb_is_refused_and_the_next_conversation_is_rendered(tokenizer, monkeypatch, bomb):
    monkeypatch.setattr(foreign, "SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(InputError, match="chat_template"):
        render([USER], with_text(tokenizer, bomb), True)
    assert time.monotonic() - start < 10
    monkeypatch.undo()
    assert render([USER], with_text(tokenizer, BRACKETS), True).ids


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
    ],
)
def test_what_a_template_must_not_do_is_an_error_with_its_reason(tokenizer, escape):
    with pytest.raises(InputError, match=r"chat_template fails: \w+Error"):
        render([USER], with_text(tokenizer, escape), True)


def test_without_jinja_the_error_names_the_package(tokenizer, monkeypatch):
    monkeypatch.setattr(foreign, "_sandbox", foreign.Sandbox())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install jinja2"):
        render([USER], with_text(tokenizer, BRACKETS), True)


def test_a_template_that_is_no_text_is_refused(tokenizer):
    with pytest.raises(InputError, match="chat_template is a int"):
        with_text(tokenizer, 7)  # type: ignore[arg-type]
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": BRACKETS}]
    assert with_text(tokenizer, listed).chat_template == BRACKETS  # type: ignore[arg-type]


def test_a_process_that_died_is_started_again(tokenizer):
    ours = with_text(tokenizer, BRACKETS)
    before = render([USER], ours, True)
    child = foreign._sandbox._child
    assert child is not None
    child.kill()
    child.wait()
    assert render([USER], ours, True) == before


def test_threads_share_the_process(tokenizer):
    ours = with_text(tokenizer, BRACKETS)
    talks = [[{"role": "user", "content": f"question {i}"}] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda talk: render(talk, ours, True), talks))
    assert found == [render(talk, ours, True) for talk in talks]
