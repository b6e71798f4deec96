import pytest

from benthic.base.errors import InputError
from benthic.data.documents import Document
from benthic.data.split import is_held_out

DOCUMENTS = [Document(f"corpus/{i}.txt", "text", "test") for i in range(5000)]


def held_out(share, seed=0):
    return {d.id for d in DOCUMENTS if is_held_out(d, share, seed)}


def test_the_share_is_about_what_was_asked():
    assert abs(len(held_out(0.1)) - 500) < 100
    assert (len(held_out(0.0)), len(held_out(1.0))) == (0, 5000)


def test_a_greater_share_only_adds_documents():
    assert held_out(0.01) < held_out(0.1)


def test_another_seed_holds_out_others_and_the_same_seed_the_same():
    assert held_out(0.1, seed=1) != held_out(0.1)
    assert held_out(0.1) == held_out(0.1)


def test_the_choice_is_the_same_on_every_machine():
    assert [i for i in range(40) if is_held_out(DOCUMENTS[i], 0.1, 0)] == [31]


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(InputError, match=r"1\.5"):
        is_held_out(DOCUMENTS[0], 1.5, 0)
