import dataclasses

import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.llm import LLM
from benthic.model.fp8 import is_fp8, to_fp8
from benthic.model.hf import load, write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe, chat

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    tokenizer = bpe.train(["the sea is deep, the deep is dark and cold, so cold"], 270)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    path = tmp_path_factory.mktemp("models") / "whole"
    write_model(path, initialise(Transformer(config), std=0.15, seed=1), tokenizer)
    return path


def test_text_prompts_get_the_begin_of_sentence_and_give_text(folder):
    llm = LLM(folder, device="cpu", config=EngineConfig(max_num_seqs=4))
    one = llm.generate("the sea", GREEDY)
    both = llm.generate(["the sea", "the deep"], GREEDY)
    assert len(one) == 1
    assert one[0].token_ids == both[0].token_ids
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("the sea")]
    assert one[0].prompt_token_ids == ids
    assert llm.generate([ids], GREEDY)[0].token_ids == one[0].token_ids
    assert one[0].text == llm.tokenizer.decode(one[0].token_ids, skip_special=True) != ""


@pytest.mark.parametrize("stored", [True, False], ids=["blocks in the files", "wide files"])
def test_fp8_weights_are_those_of_the_files_or_made_while_loading(folder, tmp_path, stored):
    model, tokenizer = load(folder, device="cpu")
    write_model(tmp_path / "m", model, tokenizer, fp8=stored)
    llm = LLM(tmp_path / "m", device="cpu", config=EngineConfig(quantization="fp8"))
    assert is_fp8(llm.engine.model)
    assert llm.engine.replica.model is llm.engine.model
    model, _ = load(tmp_path / "m", device="cpu")
    to_fp8(model)
    expected = Engine(model, tokenizer, EngineConfig(backend="plain")).generate([[5, 9, 30, 2]], GREEDY)
    found = llm.generate([[5, 9, 30, 2]], GREEDY)
    assert found[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-5)


def test_chat_sends_exactly_the_rendered_conversation(folder):
    llm = LLM(folder, device="cpu")
    talk = [{"role": "user", "content": "is the sea deep?"}]
    (output,) = llm.chat(talk, GREEDY)
    assert output.prompt_token_ids == chat.render(talk, llm.tokenizer, add_generation_prompt=True).ids
    assert [o.token_ids for o in llm.chat([talk, talk], GREEDY)] == [output.token_ids] * 2


def test_a_chosen_chat_template_is_that_of_every_conversation(folder, tmp_path):
    talk = [{"role": "user", "content": "is the sea deep?"}]
    llm = LLM(folder, device="cpu", chat_template="v3.1")
    own = LLM(folder, device="cpu").tokenizer
    for thinking in (None, False, True):
        (output,) = llm.chat(talk, GREEDY, thinking=thinking)
        expected = chat.render(talk, own.with_template("v3.1"), add_generation_prompt=True, thinking=thinking)
        assert output.prompt_token_ids == expected.ids
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    (output,) = LLM(folder, device="cpu", chat_template=tmp_path / "own.jinja").chat(talk, GREEDY)
    assert output.prompt_token_ids == own.encode("is the sea deep?")


def test_a_wrong_chat_template_is_refused_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benthic.inference.llm.load", lambda *_, **__: pytest.fail("the weights were read"))
    (tmp_path / "bad.jinja").write_text("{% if %}", encoding="utf-8")
    for choice, problem in (("v9", "unknown template 'v9'"), (tmp_path / "bad.jinja", "TemplateSyntaxError")):
        with pytest.raises(InputError, match=problem):
            LLM(folder, device="cpu", chat_template=choice)


def test_thinking_that_the_template_cannot_choose_is_refused_by_its_name(folder):
    with pytest.raises(InputError, match="thinking=True is not a choice in template 'v3'"):
        LLM(folder, device="cpu").chat([{"role": "user", "content": "?"}], GREEDY, thinking=True)


def test_a_folder_without_tokenizer_takes_ids_only(tmp_path, model):
    write_model(tmp_path / "bare", model, None)
    llm = LLM(tmp_path / "bare", device="cpu")
    assert llm.generate([[1, 2, 3]], GREEDY)[0].text == ""
    with pytest.raises(InputError, match="a text prompt needs a tokenizer"):
        llm.generate("the sea", GREEDY)
    with pytest.raises(InputError, match=r"chat\(\) needs a tokenizer"):
        llm.chat([{"role": "user", "content": "?"}], GREEDY)


def test_a_closed_llm_has_closed_its_engine(folder, monkeypatch):
    with LLM(folder, device="cpu", config=EngineConfig(max_num_seqs=4)) as llm:
        closed = []
        monkeypatch.setattr(llm.engine, "close", lambda: closed.append(True))
        llm.generate("the sea", GREEDY)
        assert not closed
    assert closed == [True]
