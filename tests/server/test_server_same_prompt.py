"""One chat format from start to answer: the library, the terminal and the server give the model the same ids."""

import random

import openai
import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.llm import LLM
from benthic.jobs import chat as terminal
from benthic.model.config import ModelConfig
from benthic.model.hf import write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.server.app import serve
from benthic.server.config import ServeConfig
from benthic.tokenizer import bpe
from benthic.tokenizer.templates import TEMPLATES

WORDS = [
    "hi",
    "好。",
    " a  b",
    "1+1=2\n",
    "\n\n x",
    "",
    "12345",
    "ü 🙂",
    "<think>hm</think>4",
    "<｜User｜>",
    "hm</think>4",
]
ONE = SamplingParams(max_tokens=2, temperature=1.0, seed=7)
CASES = [(name, thinking) for name, template in TEMPLATES.items() for thinking in (None, *template.openings)]


def talk(rng: random.Random) -> list[dict[str, str]]:
    """A conversation of one to six turns."""
    roles = rng.choices(["system", "user", "user", "assistant"], k=rng.randint(1, 6))
    return [{"role": role, "content": rng.choice(WORDS)} for role in roles]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{pre-tokenizer: model folder}."""
    text = ["hello world, this is a test of the server. 你好世界"] * 3
    made = {}
    for kind in ("v1", "v3"):
        tokenizer = bpe.train(text, 290, pretokenizer=kind)
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
            intermediate_size=16, first_k_dense_replace=1, max_position_embeddings=512,
        )  # fmt: skip
        made[kind] = tmp_path_factory.mktemp(kind) / "tiny"
        write_model(made[kind], initialise(Transformer(config), std=0.1, seed=1), tokenizer)
    return made


@pytest.mark.parametrize(("name", "thinking"), CASES)
def test_the_same_conversation_is_the_same_prompt_and_the_same_answer_everywhere(
    folders, launch, monkeypatch, name, thinking
):
    folder = folders["v1" if TEMPLATES[name].system == "in place" else "v3"]
    llm = LLM(folder, device="cpu", chat_template=name, config=EngineConfig(max_num_seqs=1))
    prompts, ids, add, step = [], [], llm.engine.add, llm.engine.step
    monkeypatch.setattr(llm.engine, "add", lambda request: prompts.append(request.prompt_token_ids) or add(request))

    def recorded():
        done = step()
        ids.extend(token for delta in done.deltas for token in delta.token_ids)
        return done

    def seen():
        found = (list(map(list, prompts)), list(ids))
        prompts.clear()
        ids.clear()
        return found

    monkeypatch.setattr(llm.engine, "step", recorded)
    talks = [talk(random.Random(i)) for i in range(50)]
    for messages in talks:
        llm.chat(messages, ONE, thinking=thinking)
    by_library = seen()
    for messages in talks:
        list(terminal.stream(llm, llm.prompt(messages, thinking), ONE))
    by_terminal = seen()
    server = launch(
        engine=llm.engine, tokenizer=llm.tokenizer, max_model_len=512
    )  # from here the engine is its thread's
    extra = {} if thinking is None else {"extra_body": {"chat_template_kwargs": {"thinking": thinking}}}
    for messages in talks:
        server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=2, temperature=1.0, seed=7, **extra
        )
    assert seen() == by_terminal == by_library
    assert len(by_library[0]) == 50


def test_an_answer_sent_back_is_in_the_next_prompt_as_it_was_generated(launch, engine):
    """V1 has answers begin with a blank, which its template writes by itself before a message."""
    tokenizer = bpe.train(["hello world, this is a test of the server."], 280, pretokenizer="v1")
    engine.script = [*tokenizer.encode(" hello world"), tokenizer.eos_id]
    server = launch(tokenizer=tokenizer)
    ask = [{"role": "user", "content": "hi"}]
    for stream in (False, True):
        answer = server.client.chat.completions.create(model="tiny", messages=ask, stream=stream)
        parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
        content = "".join(part.content or "" for part in parts)
        assert content == "hello world"
        first = engine.requests[-1].prompt_token_ids
        again = [*ask, {"role": "assistant", "content": content}, *ask]
        server.client.chat.completions.create(model="tiny", messages=again)
        said = [*first, *engine.script]
        assert engine.requests[-1].prompt_token_ids[: len(said)] == said


def test_reasoning_is_told_from_content_where_the_prompt_begins_the_thought(launch, engine, tokenizer):
    for name, thinking, parts in (("r1", True, ("so", "yes")), ("v3.1", True, ("so", "yes")), ("v3.1", False, None)):
        chosen = tokenizer.with_template(name)
        engine.script = [*chosen.encode("so"), chosen.id_of("</think>"), *chosen.encode("yes"), chosen.eos_id]
        answer = launch(tokenizer=chosen, thinking=thinking).client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}]
        )
        message = answer.choices[0].message
        found = (getattr(message, "reasoning_content", None), message.content)
        assert found == (parts or (None, "so</think>yes"))


def prompt_of(server, engine, **fields) -> list[int]:
    server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], **fields)
    return engine.requests[-1].prompt_token_ids


def test_the_servers_default_is_used_where_the_request_leaves_thinking_open(launch, engine, tokenizer):
    chosen = tokenizer.with_template("v3.1")
    server = launch(tokenizer=chosen, thinking=True)
    think, end = chosen.id_of("<think>"), chosen.id_of("</think>")
    assert prompt_of(server, engine)[-1] == think
    assert prompt_of(server, engine, extra_body={"chat_template_kwargs": {}})[-1] == think
    assert prompt_of(server, engine, extra_body={"chat_template_kwargs": {"thinking": False}})[-1] == end


def test_thinking_that_the_served_format_cannot_choose_is_refused_by_field_and_format(launch, engine):
    with pytest.raises(openai.BadRequestError, match="template 'v3'") as caught:
        prompt_of(launch(), engine, extra_body={"chat_template_kwargs": {"thinking": True}})
    assert caught.value.param == "chat_template_kwargs.thinking"
    assert not engine.requests


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"chat_template": "v3.2"}, "unknown template 'v3.2'"),
        ({"chat_template": "v3"}, "needs the token"),
        ({"chat_template": "v1", "thinking": "on"}, "template 'v1'"),
    ],
)
def test_serve_refuses_a_format_that_it_cannot_use_at_the_start(folders, flags, problem):
    with pytest.raises(InputError, match=problem):
        serve(ServeConfig(model=str(folders["v1"]), port=0, device="cpu", **flags))
