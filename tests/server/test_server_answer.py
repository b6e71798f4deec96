"""An answer read from its tokens: stop strings, reasoning, log-probabilities, and pieces that do not depend on how the
tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.server.answer import Answer, CallPiece, Piece, Style, joined


class Letters:
    """Ids are bytes; 0 is a control token."""

    def bytes_of_all(self, ids, skip_special=False):
        return b"".join(bytes([id]) if id or not skip_special else b"" for id in ids)


class Capitals:
    """A reader of calls: a capital letter is a call of that name; a `!` before it is held back."""

    def __init__(self, most=99):
        self.held, self.calls, self.most = 0, 0, most

    @property
    def done(self):
        return self.calls >= self.most

    def feed(self, text):
        content, calls = "", ()
        for c in text:
            if c == "!":
                self.held += 1
                continue
            content, self.held = content + "!" * self.held, 0
            if c.isupper():
                calls += (CallPiece(self.calls, f"id{self.calls}", c, "{}"),)
                self.calls += 1
            else:
                content += c
        return content, calls

    def finish(self):
        return "!" * self.held, ()


def read(ids, cuts=(), calls=None, **style):
    """(the pieces of an answer whose tokens arrive in pieces, the answer)."""
    answer, pieces, rest = Answer(Letters(), Style(**style), calls), [], list(ids)
    for cut in [*cuts, len(rest)]:
        part, rest = rest[:cut], rest[cut:]
        pieces += answer.feed(part, [-float(id) for id in part], [[(id, -1.0)] for id in part])
    return pieces + answer.finish(), answer


def whole(pieces, stop=(), thinks=False):
    """(reasoning, content) and whether a stop string ended it."""
    text = "".join(pieces).encode()
    cuts = [len(piece.encode()) for piece in pieces]
    got, answer = read(text, cuts, stop=tuple(stop), thinks=thinks)
    return joined(got)[:2], answer.stopped


def test_text_without_tags_is_content():
    assert whole(["<thin", "g> and ", "</think>"]) == (("", "<thing> and </think>"), False)


def test_reasoning_ends_at_the_closing_tag():
    assert whole(["<think>a < b</", "think>yes"])[0] == ("a < b", "yes")
    assert whole(["<th", "ink>so", "</think>", "</think>"])[0] == ("so", "</think>")


def test_a_thought_that_the_prompt_began_is_reasoning_up_to_its_end():
    assert whole(["so", "</thi", "nk>yes"], thinks=True)[0] == ("so", "yes")
    assert whole(["so"], thinks=True)[0] == ("so", "")
    assert whole(["so</think>yes"])[0] == ("", "so</think>yes")


def test_reasoning_that_never_ends_is_all_reasoning():
    assert whole(["<think>hm </thin"])[0] == ("hm </thin", "")
    assert whole(["<think>"])[0] == ("", "")


def test_the_stop_string_that_is_complete_first_wins():
    assert whole(["abcd"], stop=("abcd", "bc")) == (("", "a"), True)
    assert whole(["a", "b", "c", "d"], stop=("abcd", "bc")) == (("", "a"), True)
    assert whole(["xabc"], stop=("bc", "abc")) == (("", "x"), True)


def test_text_is_sent_as_soon_as_it_cannot_be_the_start_of_a_stop_string():
    answer = Answer(Letters(), Style(stop=("END",)))
    fed = [joined(answer.feed([id])).content for id in b"aENbEND"]
    assert fed == ["a", "", "", "ENb", "", "", ""]
    assert answer.stopped


def test_the_stop_string_can_stay_and_does_not_count_among_the_first_tokens():
    assert joined(read(b"aENDb", stop=("END",), include_stop=True)[0]).content == "aEND"
    pieces, answer = read(b"aENDbEND", stop=("END",), min_tokens=4)
    assert (joined(pieces).content, answer.tokens) == ("aENDb", 8)


def test_the_lead_of_a_chat_format_is_left_out_once():
    assert joined(read(b"  a", lead=" ")[0]).content == " a"
    assert joined(read(b"a", lead=" ")[0]).content == "a"


def test_a_token_comes_with_the_piece_that_holds_its_last_byte():
    pieces, _ = read("<éa".encode())
    assert [(p.content, bytes(t.id for t in p.tokens)) for p in pieces] == [("<é", "<é".encode()), ("a", b"a")]
    assert [t.offset for t in joined(pieces).tokens] == [0, 1, 1, 2]


def test_tokens_of_a_cut_stop_string_come_with_its_end_and_later_ones_never():
    pieces, answer = read(b"aENDb", stop=("END",))
    assert [bytes(t.id for t in p.tokens) for p in pieces] == [b"a", b"END"]
    assert answer.tokens == 4


def test_half_a_character_at_the_end_becomes_one_replacement_and_its_tokens_are_told():
    pieces, _ = read("é".encode()[:1])
    assert [(p.content, len(p.tokens)) for p in pieces] == [("\ufffd", 1)]


@pytest.mark.parametrize(
    ("text", "thinks", "count"),
    [("<think>so</think>yes", False, 17), ("so</think>yes", True, 10), ("so\0", True, 3), ("yes", False, 0),
     ("<thing>", False, 0), ("<think>so", False, 9)],
)  # fmt: skip
def test_tokens_of_a_thought_and_its_tags_are_counted(text, thinks, count):
    assert read(text.encode(), thinks=thinks)[1].reasoning_tokens == count


def test_calls_are_told_from_content_and_end_the_answer_where_only_one_may_be():
    pieces, answer = read(b"so!A!B", calls=Capitals())
    assert [(p.content, [c.name for c in p.calls]) for p in pieces if p.content or p.calls] == [
        ("s", []), ("o", []), ("!", ["A"]), ("!", ["B"]),
    ]  # fmt: skip
    assert answer.called
    _, answer = read(b"xABy", calls=Capitals(most=1))
    assert (answer.stopped, answer.tokens) == (True, 2)


def test_pieces_of_one_call_are_joined():
    calls = [CallPiece(0, "a", "f", "{"), CallPiece(0, "", "", "}"), CallPiece(1, "b", "g", "")]
    assert joined([Piece(calls=(c,)) for c in calls]).calls == (CallPiece(0, "a", "f", "{}"), calls[2])
    assert joined([]) == Piece()


ALPHABET = st.sampled_from(["<think>", "</think>", "<", "a", "b", "ab", "/think>", "é", "你", "\0", "A", "!"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ALPHABET, max_size=12).map(lambda parts: "".join(parts).encode()),
    st.lists(st.integers(1, 5), min_size=1, max_size=40),
    st.lists(st.text("ab<", min_size=1, max_size=3), max_size=3),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
)
def test_pieces_are_the_same_however_many_tokens_arrive_at_once(data, cuts, stop, thinks, min_tokens, calls):
    style = {"stop": tuple(stop), "thinks": thinks, "min_tokens": min_tokens}
    at_once, first = read(data, calls=Capitals() if calls else None, **style)
    cut, second = read(data, cuts, calls=Capitals() if calls else None, **style)
    assert cut == at_once
    assert (first.tokens, first.reasoning_tokens, first.stopped) == (
        second.tokens,
        second.reasoning_tokens,
        second.stopped,
    )
    tokens = joined(cut).tokens
    assert [t.id for t in tokens] == list(data[: first.tokens])
    assert [t.logprob for t in tokens] == [-float(id) for id in data[: first.tokens]]
