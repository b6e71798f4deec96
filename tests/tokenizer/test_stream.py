import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.tokenizer.stream import TextStream


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 419), st.integers(130, 258))), cuts=st.lists(st.integers(0, 40)))
def test_pieces_join_to_what_decode_gives_for_any_ids(tokenizer, ids, cuts):
    stream, bounds = TextStream(tokenizer), sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
    pieces = [stream.feed(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_half_a_character_is_never_shown(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("😀é好")
    pieces = [stream.feed([i]) for i in ids]
    assert "".join(pieces) == "😀é好"
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_a_character_that_never_ends_is_replaced_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.feed(tokenizer.encode("😀")[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_control_tokens_can_be_left_out(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]
    assert TextStream(tokenizer, skip_special=True).feed(ids) == tokenizer.decode(ids, skip_special=True) == "hi"
