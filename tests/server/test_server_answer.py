"""Text of an answer: stop strings, reasoning, and pieces that do not depend on how the text arrives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.server.answer import Answer, Piece


class Letters:
    """A decoder whose ids are code points."""

    def feed(self, ids):
        return "".join(map(chr, ids))

    def finish(self):
        return ""


def whole(pieces, stop=(), thinks=False):
    answer = Answer(Letters(), stop, thinks)
    parts = [answer.feed([ord(c) for c in piece]) for piece in pieces] + [answer.finish()]
    return Piece("".join(p.reasoning for p in parts), "".join(p.content for p in parts)), answer.stopped


def test_text_without_tags_is_content():
    assert whole(["<thin", "g> and ", "</think>"]) == (Piece("", "<thing> and </think>"), False)


def test_reasoning_ends_at_the_closing_tag():
    assert whole(["<think>a < b</", "think>yes"])[0] == Piece("a < b", "yes")
    assert whole(["<th", "ink>so", "</think>", "</think>"])[0] == Piece("so", "</think>")


def test_a_thought_that_the_prompt_began_is_reasoning_up_to_its_end():
    assert whole(["so", "</thi", "nk>yes"], thinks=True)[0] == Piece("so", "yes")
    assert whole(["so"], thinks=True)[0] == Piece("so", "")
    assert whole(["so</think>yes"])[0] == Piece("", "so</think>yes")


def test_reasoning_that_never_ends_is_all_reasoning():
    assert whole(["<think>hm </thin"])[0] == Piece("hm </thin", "")
    assert whole(["<think>"])[0] == Piece("", "")


def test_the_stop_string_that_is_complete_first_wins():
    assert whole(["abcd"], stop=("abcd", "bc")) == (Piece("", "a"), True)
    assert whole(["a", "b", "c", "d"], stop=("abcd", "bc")) == (Piece("", "a"), True)
    assert whole(["xabc"], stop=("bc", "abc")) == (Piece("", "x"), True)


def test_text_is_sent_as_soon_as_it_cannot_be_the_start_of_a_stop_string():
    answer = Answer(Letters(), ("END",))
    fed = [answer.feed([ord(c)]).content for c in "aENbEND"]
    assert fed == ["a", "", "", "ENb", "", "", ""]
    assert answer.stopped


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "a", "b", "ab", "/think>", "é"]), max_size=12).map("".join),
    st.lists(st.integers(1, 5), min_size=1, max_size=40),
    st.lists(st.text("ab<", min_size=1, max_size=3), max_size=3),
)
def test_pieces_join_to_the_same_answer_however_the_text_is_cut(text, cuts, stop):
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert whole([*pieces, rest], stop) == whole([text], stop)
