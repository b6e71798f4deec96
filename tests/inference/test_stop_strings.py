import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.inference.config import SamplingParams
from benthic.inference.stop import StopStrings, Transcript
from benthic.tokenizer import bpe

pieces = st.lists(st.text("abA", max_size=4), max_size=12)
stops = st.lists(st.text("abA", min_size=1, max_size=5), max_size=4)


def plain(text: str, stop: list[str], include: bool) -> tuple[str, str]:
    """The definition: of all occurrences the one that ends first, of those the longest."""
    ends = [(end, -len(s), s) for s in stop for end in range(len(s), len(text) + 1) if text[end - len(s) : end] == s]
    if not ends:
        return text, ""
    end, _, s = min(ends)
    return text[: end if include else end - len(s)], s


@settings(max_examples=400, deadline=None)
@given(pieces, stops, st.booleans())
def test_pieces_join_to_the_text_that_a_plain_search_cuts(parts, stop, include):
    stopper = StopStrings(stop, include)
    out = "".join(stopper.feed(part)[0] for part in parts) + stopper.finish()
    assert (out, stopper.hit) == plain("".join(parts), stop, include)


@settings(max_examples=400, deadline=None)
@given(pieces, stops)
def test_what_is_shown_is_never_taken_back_and_nothing_is_held_without_need(parts, stop):
    stopper, text, shown = StopStrings(stop), "", ""
    for part in parts:
        text += part
        safe, hit = stopper.feed(part)
        shown += safe
        want, found = plain(text, stop, False)
        assert want.startswith(shown)
        assert hit == found
        if hit:
            assert shown == want
        else:
            held = text[len(shown) :]
            assert held == max(
                (s[:k] for s in stop for k in range(len(s)) if text.endswith(s[:k])), key=len, default=""
            )


def test_a_stop_string_that_never_comes_shows_everything_in_the_end():
    stopper = StopStrings(["END"])
    assert [stopper.feed(part)[0] for part in ("EN", "E", "ND"[:1])] == ["", "EN", ""]
    assert stopper.finish() == "EN"
    assert (stopper.finish(), stopper.hit) == ("", "")


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train(["hello END of text. 深度求索 é " * 20], 290)


def test_a_transcript_ends_with_the_token_that_completes_the_stop_string(tokenizer):
    ids = tokenizer.encode("hello ") + tokenizer.encode("E") + tokenizer.encode("N") + tokenizer.encode("D tail")
    transcript = Transcript(tokenizer, SamplingParams(stop="END"))
    used = transcript.feed(ids)
    assert transcript.hit == "END"
    assert "END" in tokenizer.decode(ids[:used])
    assert "END" not in tokenizer.decode(ids[: used - 1])
    assert transcript.finish() == "hello "
    included = Transcript(tokenizer, SamplingParams(stop="END", include_stop_str_in_output=True))
    included.feed(ids)
    assert included.finish() == "hello END"


def test_stop_strings_do_not_count_before_min_tokens(tokenizer):
    ids = [*tokenizer.encode("END"), *tokenizer.encode(" END"), tokenizer.eos_id]
    first = len(tokenizer.encode("END"))
    transcript = Transcript(tokenizer, SamplingParams(stop="END", max_tokens=99, min_tokens=first))
    assert transcript.feed(ids[:first]) == first
    assert not transcript.hit
    transcript.feed(ids[first:])
    assert transcript.hit == "END"
    assert transcript.finish() == "END "


def test_half_a_character_at_the_end_is_shown_as_unfinished(tokenizer):
    half = [i for i in range(tokenizer.vocab_size) if tokenizer.bytes_of(i) == "深".encode()[:1]]
    transcript = Transcript(tokenizer, SamplingParams(stop="END"))
    assert transcript.feed([*tokenizer.encode("E"), *half]) == 2
    assert transcript.text == ""
    assert transcript.finish() == "E�"
