import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.batch import IGNORE
from benthic.base.errors import InputError
from benthic.data.packing import Sample, pack

LENGTH, PAD = 16, 2


@st.composite
def samples(draw):
    n = draw(st.integers(2, LENGTH))
    ids = draw(st.lists(st.integers(3, 99), min_size=n, max_size=n))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda mask: any(mask[1:])))
    return Sample(ids, mask, {"advantage": draw(st.lists(st.floats(-9, 9, width=32), min_size=n, max_size=n))})


def unpack(batch):
    """(ids, [(target, advantage) where there is loss], positions) of every segment, read back from the rows."""
    found = []
    for r in range(len(batch.ids)):
        for segment in range(1, int(batch.segments[r].max()) + 1):
            at = batch.segments[r] == segment
            labels, extra = batch.labels[r][at], batch.extra["advantage"][r][at]
            learned = [(int(t), float(a)) for t, a in zip(labels, extra) if t != IGNORE]
            found.append((batch.ids[r][at].tolist(), learned, batch.positions[r][at].tolist()))
    return found


@settings(max_examples=80, deadline=None)
@given(given_samples=st.lists(samples(), min_size=1, max_size=12))
def test_every_sample_comes_back_once_with_its_targets(given_samples):
    batch = pack(given_samples, LENGTH, PAD)
    expected = [
        (
            s.ids,
            [(s.ids[j], s.extra["advantage"][j]) for j in range(1, len(s.ids)) if s.mask[j]],
            list(range(len(s.ids))),
        )
        for s in given_samples
    ]
    assert sorted(unpack(batch)) == sorted(expected)
    assert int(batch.targets()) == sum(sum(s.mask[1:]) for s in given_samples)
    padding = batch.segments == 0
    assert (batch.ids[padding] == PAD).all()
    assert (batch.labels[padding] == IGNORE).all()
    assert (batch.extra["advantage"][batch.labels == IGNORE] == 0).all()


def test_a_label_never_reaches_into_the_next_sample():
    batch = pack([Sample([5, 6], [False, True]), Sample([7, 8], [True, True])], 4, PAD)
    assert batch.ids.tolist() == [[5, 6, 7, 8]]
    assert batch.labels.tolist() == [[6, IGNORE, 8, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 0, 1]]
    assert batch.segments.tolist() == [[1, 1, 2, 2]]


def test_best_fit_fills_rows_and_is_deterministic():
    lengths = [9, 7, 8, 8, 3, 13]
    batch = pack([Sample([1] * n, [True] * n) for n in lengths], LENGTH, PAD)
    assert len(batch.ids) == 3
    assert (batch.segments > 0).all()
    again = pack([Sample([1] * n, [True] * n) for n in lengths], LENGTH, PAD)
    assert torch.equal(batch.segments, again.segments)


@pytest.mark.parametrize(
    ("given_samples", "problem"),
    [
        ([], "no sample"),
        ([Sample([1] * 17, [True] * 17)], "sample 0 has 17 tokens"),
        ([Sample([1, 2], [False, True]), Sample([1, 2], [True, False])], "sample 1 has nothing to learn"),
        ([Sample([], [])], "nothing to learn"),
        ([Sample([1, 2], [True])], "mask of sample 0 has 1 values for 2 tokens"),
        ([Sample([1, 2], [True, True], {"w": [1.0]})], "w of sample 0"),
        ([Sample([1, 2], [True, True], {"w": [1.0, 1.0]}), Sample([1, 2], [True, True])], "sample 1 has"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_by_number(given_samples, problem):
    with pytest.raises(InputError, match=problem):
        pack(given_samples, LENGTH, PAD)
