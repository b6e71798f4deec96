import pytest

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, tokens


def test_the_layout_is_controls_then_bytes_then_merges_then_chat_tokens(tokenizer):
    assert [tokenizer.id_of(name) for name in tokens.FIRST] == [0, 1, 2]
    assert sorted(tokenizer.bytes_of(i) for i in range(3, 259)) == [bytes([byte]) for byte in range(256)]
    assert all(len(tokenizer.bytes_of(i)) > 1 for i in range(259, 413))
    assert [tokenizer.id_of(name) for name in tokens.LAST] == list(range(413, 420))
    assert tokenizer.vocab_size == 420


def test_a_merge_never_crosses_a_piece_of_the_v3_pretokenizer(tokenizer):
    for i in range(259, 413):
        text = tokenizer.bytes_of(i).decode("utf-8", "ignore")
        digits = sum(c.isdigit() for c in text)
        assert digits in (0, len(text))
        assert digits <= 3
        assert "・" not in text or text == "・"


def test_training_does_not_depend_on_the_order_of_the_texts(tokenizer, texts):
    again = bpe.train(texts[::-1], 420)
    assert [again.bytes_of(i) for i in range(420)] == [tokenizer.bytes_of(i) for i in range(420)]


def test_progress_counts_every_text(texts):
    seen: list[int] = []
    bpe.train(texts, 300, on_progress=seen.append)
    assert seen == list(range(1, len(texts) + 1))


def test_a_lone_surrogate_in_the_training_text_is_replaced(texts):
    assert bpe.train([*texts, "\ud800"], 300).vocab_size == 300


def test_a_vocabulary_too_small_for_bytes_and_added_tokens_is_refused(texts):
    with pytest.raises(InputError, match="use 266 or more"):
        bpe.train(texts, 265)
    assert bpe.train(texts, 266).decode(bpe.train(texts, 266).encode("héllo")) == "héllo"


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no text"):
        bpe.train([], 300)


def test_a_vocabulary_larger_than_the_texts_can_fill_is_refused_with_the_number_that_fits():
    with pytest.raises(InputError, match=r"vocab_size=400 .*\(26\d\)"):
        bpe.train(["aa"], 400)
