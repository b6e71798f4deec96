import dataclasses

import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.llm import LLM
from benthic.model.hf import write_model
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


def test_chat_sends_exactly_the_rendered_conversation(folder):
    llm = LLM(folder, device="cpu")
    talk = [{"role": "user", "content": "is the sea deep?"}]
    (output,) = llm.chat(talk, GREEDY)
    assert output.prompt_token_ids == chat.render(talk, llm.tokenizer, add_generation_prompt=True).ids
    assert [o.token_ids for o in llm.chat([talk, talk], GREEDY)] == [output.token_ids] * 2


def test_a_folder_without_tokenizer_takes_ids_only(tmp_path, model):
    write_model(tmp_path / "bare", model, None)
    llm = LLM(tmp_path / "bare", device="cpu")
    assert llm.generate([[1, 2, 3]], GREEDY)[0].text == ""
    with pytest.raises(InputError, match="a text prompt needs a tokenizer"):
        llm.generate("the sea", GREEDY)
    with pytest.raises(InputError, match=r"chat\(\) needs a tokenizer"):
        llm.chat([{"role": "user", "content": "?"}], GREEDY)
