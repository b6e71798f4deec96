"""Prompts, the answers to them, and the choice of a chat format: what was said can be rendered again as it was."""

import random
import re

import pytest

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, templates, tokens
from benthic.tokenizer.chat import check, render
from benthic.tokenizer.templates import TEMPLATES, ThinkingRefused
from benthic.tokenizer.tokenizer import Tokenizer

USER = {"role": "user", "content": "2+2?"}
WORDS = [
    "hi",
    "好。",
    " a  b",
    "1+1=2\n",
    "\n\n x",
    "",
    "  ",
    "12345",
    "ü 🙂",
    "... ok?",
    "\n",
    "<｜User｜>",
    "(a)\r\n",
]
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[A]{{ m.content }}{{ eos_token }}"
    "{% else %}[U]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
CASES = [(name, thinking) for name, template in TEMPLATES.items() for thinking in template.openings]


@pytest.fixture(scope="module")
def of(texts):
    """of(name) -> a tokenizer with that chat format."""
    v1, v3 = bpe.train(texts, 400, pretokenizer="v1"), bpe.train(texts, 420, tools=True)
    return lambda name: (v3 if TEMPLATES[name].tools else v1).with_template(name)


@pytest.fixture
def jinja_file(tmp_path):
    """jinja_file(text) -> its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "chat.jinja"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def talk(rng: random.Random) -> list[dict]:
    """Turns in any order, the last of them a question."""
    roles = rng.choices(["system", "user", "assistant"], k=rng.randint(0, 5))
    return [{"role": role, "content": rng.choice(WORDS)} for role in [*roles, "user"]]


def written(rng: random.Random, name: str, thinking: bool) -> str:
    """What a model may write after a prompt in this format: a thought, finished or not, and an answer."""
    thought, answer = rng.choice(WORDS), rng.choice(WORDS)
    if not thinking:
        free = TEMPLATES[name].forgets and not TEMPLATES[name].openings[False] and rng.random() < 0.5
        return TEMPLATES[name].lead + (f"<think>{thought}</think>" if free else "") + answer
    return rng.choice([f"{thought}</think>{answer}", f"{thought}</think>{answer}</think>{answer}", thought])


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Text as a model writes it, with thinking tags as tokens where there are such."""
    tags = {name: [tokenizer.special[name]] for name in (tokens.THINK, tokens.END_THINK) if name in tokenizer.special}
    return [i for part in tokens.THINKING.split(text) for i in tags.get(part) or tokenizer.encode(part)]


@pytest.mark.parametrize(("name", "thinking"), CASES)
def test_prompt_answer_and_end_are_the_rendering_of_the_conversation_with_that_answer(of, name, thinking):
    tokenizer, rng = of(name), random.Random(5)
    exact = 0
    for _ in range(200):
        messages, text = talk(rng), written(rng, name, thinking)
        prompt = render(messages, tokenizer, True, thinking=thinking)
        again = render([*messages, {"role": "assistant", "content": prompt.content(text)}], tokenizer)
        said = [*prompt.ids, *ids_of(tokenizer, text), tokenizer.eos_id]
        assert tokenizer.decode(again.ids) == tokenizer.decode(said)
        if not (prompt.opening.endswith("\n") and text[:1].isspace()):  # blanks may merge with those of the prompt
            assert again.ids == said, (messages, text)
            assert again.mask[len(prompt.ids) :] == [True] * (len(said) - len(prompt.ids))
            exact += 1
    assert exact > 100


@pytest.mark.parametrize(("name", "thinking"), CASES)
def test_an_earlier_answer_is_in_the_next_prompt_as_it_was_but_for_its_finished_thought(of, name, thinking):
    tokenizer, rng = of(name), random.Random(6)
    for _ in range(100):
        messages, text = talk(rng), written(rng, name, thinking)
        prompt = render(messages, tokenizer, True, thinking=thinking)
        answer = {"role": "assistant", "content": prompt.content(text)}
        later = tokenizer.decode(render([*messages, answer, USER], tokenizer, True, thinking=thinking).ids)
        was = tokenizer.decode(prompt.ids)
        if "</think>" in text and TEMPLATES[name].forgets:
            was = was.removesuffix(prompt.opening) + TEMPLATES[name].openings.get(False, "")
            text = text.split("</think>", 1 if TEMPLATES[name].forgets == "first" else -1)[-1]
            if "</think>" in text:
                continue  # V3.1 takes what is left for a thought again: its own rule for two ends
        assert later.startswith(f"{was}{text}{tokens.EOS}"), (messages, text)


def test_the_bare_text_would_not_do(of):
    """The negative control: V1's blank would be doubled, and R1's unfinished thought become its answer."""
    for name, text in (("v1", " 4"), ("r1", "let me see")):
        prompt = render([USER], of(name), True)
        bare = render([USER, {"role": "assistant", "content": text}], of(name))
        assert bare.ids != [*prompt.ids, *of(name).encode(text), of(name).eos_id]


def test_only_a_prompt_has_an_opening_and_r1s_begins_inside_a_thought(of):
    assert (render([USER], of("r1"), True).opening, render([USER], of("r1")).opening) == ("<think>\n", "")
    assert [render([USER], of("v3.1"), True, thinking=t).thinks for t in (True, False)] == [True, False]
    assert render([USER], of("v1"), True).lead == " "
    assert render([USER], of("v1")).lead == ""


def test_the_opening_of_a_jinja_prompt_is_found_and_cannot_be_forged(of, jinja_file):
    asks = of("v3").with_template(jinja_file(BRACKETS.replace("[A]{% endif", "[A]<think>\n{% endif")))
    assert render([USER], asks, True).opening == "<think>\n"
    echo = of("v3").with_template(jinja_file("{{ bos_token }}{{ messages[-1].content }}"))
    assert render([{"role": "user", "content": "<think>"}], echo, True).opening == ""


def test_a_jinja_file_is_a_choice_beside_the_names(of, jinja_file):
    tokenizer = of("v3").with_template(jinja_file(BRACKETS))
    assert (tokenizer.template, tokenizer.chat_template) == (None, BRACKETS)
    assert tokenizer.decode(render([USER], tokenizer, True).ids) == f"{tokens.BOS}[U]2+2?[A]"
    check(tokenizer)
    known = of("v3").with_template(jinja_file(templates.jinja(TEMPLATES["r1"])))
    assert known.template == "r1"
    assert of("v3").template == "v3"  # the choice leaves the tokenizer that it was made from alone


def test_a_choice_that_is_neither_name_nor_file_names_its_neighbours(of, jinja_file, tmp_path):
    with pytest.raises(InputError, match=r"unknown template 'v3\.2', and no such file.*did you mean 'v3\.1'"):
        of("v3").with_template("v3.2")
    with pytest.raises(InputError, match="cannot read the template"):
        of("v3").with_template(tmp_path)
    with pytest.raises(InputError, match="cannot read the template"):
        of("v3").with_template(jinja_file(b"\xff\xfe"))
    with pytest.raises(InputError, match="is empty"):
        of("v3").with_template(jinja_file(""))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% if %}", r"^chat_template fails: TemplateSyntaxError: .* -> [^\n]*$"),
        ("a\n{% for x in messages %}\n{{ x", r"^chat_template fails: TemplateSyntaxError: [^\n]*$"),
        ("{{ messages[0].parts }}{{ raise_exception('no') }}", "TemplateError: no"),
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", r"'<\|im_start\|>', no token of the tokenizer"),
        ("<｜Nobody｜>{{ messages[0].content }}", "'<｜Nobody｜>', no token"),
    ],
)
def test_a_jinja_file_that_cannot_be_used_is_refused_before_the_first_conversation(of, jinja_file, text, problem):
    with pytest.raises(InputError, match=problem):
        check(of("v3").with_template(jinja_file(text)))


def test_names_that_a_user_writes_are_no_tokens_that_the_template_needs(of, jinja_file):
    tokenizer = of("v3").with_template(jinja_file(BRACKETS))
    render([{"role": "user", "content": "<|im_start|>"}], tokenizer, True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_format_whose_tokens_the_tokenizer_lacks_is_refused_naming_one_that_fits(of, name):
    check(of(name))
    other = of("v1").with_template(name)
    if TEMPLATES[name].tools:
        with pytest.raises(InputError, match=f"'{name}' needs the token '{tokens.USER}'.*use 'v1'"):
            check(other)
    else:
        check(other)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_that_a_format_cannot_choose_is_refused_naming_it(of, name, thinking):
    if thinking in TEMPLATES[name].openings:
        check(of(name), thinking)
        return
    for refusing in (lambda: check(of(name), thinking), lambda: render([USER], of(name), True, thinking=thinking)):
        with pytest.raises(ThinkingRefused, match=rf"thinking={thinking} .* template '{name}'"):
            refusing()


def test_a_jinja_template_must_ask_for_thinking_to_have_the_choice(of, jinja_file):
    deaf = of("v3").with_template(jinja_file(BRACKETS.replace("m.content", "m.content or m.thinking")))
    check(deaf)
    for refusing in (lambda: check(deaf, True), lambda: render([USER], deaf, True, thinking=False)):
        with pytest.raises(ThinkingRefused, match="chat_template"):
            refusing()
    hears = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ 'on' if thinking else 'off' }}"
    check(of("v3").with_template(jinja_file(hears)), True)


def test_a_folder_that_an_earlier_version_wrote_keeps_its_format():
    for name in ("v3", "r1", "v3.1"):
        now = templates.jinja(TEMPLATES[name])
        text = re.sub(r"{%- if tools -%}.*?{%- endfor -%}.*?{%- endif -%}", "", now, count=1)
        assert text != now
        assert templates.named(text) == name
    earlier = text.replace(
        "{%- if '</think>' not in content and not content.startswith('<think>') -%}",
        "{%- if '</think>' not in content -%}",
    )
    assert earlier != text
    assert templates.named(earlier) == "v3.1"
