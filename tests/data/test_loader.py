import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.errors import InputError
from benthic.data import shards
from benthic.data.loader import Loader, shuffled

LENGTH = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1,000 distinct tokens, so that a token names its place: 142 windows and 5 tokens of rest."""
    docs = [list(range(start, min(start + 90, 1000))) for start in range(0, 1000, 90)]
    return shards.write(tmp_path_factory.mktemp("data") / "tokens", docs, 1000, shard_tokens=300)


def global_batch(data, sample, batch_size, dp_size, seed=3):
    """First tokens of the rows of one step, over all ranks, each rank in its own loader resumed at `sample`."""
    rows, states = [], []
    for rank in range(dp_size):
        loader = Loader(data, LENGTH, batch_size, seed, rank, dp_size)
        loader.load_state_dict({**loader.state_dict(), "sample": sample})
        rows += next(loader).ids[:, 0].tolist()
        states.append(loader.state_dict())
    assert states == [states[0]] * dp_size
    return rows, states[0]["sample"]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 700), key=st.binary(max_size=8))
def test_the_order_of_an_epoch_is_a_permutation_of_its_windows(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_the_permutation_mixes():
    order = [shuffled(i, 10_000, b"key") for i in range(10_000)]
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert abs(sum(steps) / len(steps) - 10_000 / 3) < 150  # the mean distance of two random places
    assert sum(a == i for i, a in enumerate(order)) < 8


def test_labels_are_the_next_tokens(data):
    batch = next(Loader(data, LENGTH, 4, 0))
    assert batch.ids.shape == batch.labels.shape == (4, LENGTH)
    assert (batch.labels == batch.ids + 1).all()
    assert batch.positions is None
    assert batch.segments is None


@pytest.mark.parametrize("seed", range(20))
def test_every_window_of_an_epoch_comes_once_across_kills_and_changes_of_parallelism(data, seed):
    """The data ledger: at random places the run is killed and goes on with other numbers of ranks and rows."""
    rng = random.Random(seed)
    windows, sample, ledger = 142, 0, Counter()
    while sample < 2 * windows:
        dp_size = rng.choice([1, 2, 3, 4])
        batch_size = dp_size * rng.randint(1, 3)
        for _ in range(rng.randint(1, 9)):
            if sample + batch_size > 2 * windows:
                batch_size = dp_size = 1
            if sample < 2 * windows:
                rows, sample = global_batch(data, sample, batch_size, dp_size)
                ledger.update(rows)
    assert ledger == {LENGTH * w: 2 for w in range(windows)}


def test_the_ledger_catches_a_resume_that_forgets_the_sample(data):
    """The negative control: the same walk with one lost position counts some windows twice."""
    ledger = Counter()
    for sample in [*range(0, 60, 2), *range(50, 142, 2)]:
        ledger.update(global_batch(data, sample, 2, 1)[0])
    assert set(ledger.values()) != {1}


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_resume_at_another_data_parallel_degree_yields_the_same_tokens(data, dp_size):
    straight = Loader(data, LENGTH, 6, seed=3)
    for step in range(60):
        assert next(straight).ids[:, 0].tolist() == global_batch(data, 6 * step, 6, dp_size)[0]


def test_a_resumed_loader_continues_bit_for_bit(data):
    straight = Loader(data, LENGTH, 4, seed=1)
    batches = [next(straight) for _ in range(80)]
    for stop in (0, 1, 17, 35, 36, 79):
        resumed = Loader(data, LENGTH, 4, seed=1)
        resumed.load_state_dict({**straight.state_dict(), "sample": 4 * stop})
        for expected in batches[stop:]:
            got = next(resumed)
            assert (got.ids == expected.ids).all()
            assert (got.labels == expected.labels).all()


def test_epochs_and_seeds_have_their_own_order(data):
    first, second = Loader(data, LENGTH, 1, seed=1), Loader(data, LENGTH, 1, seed=2)
    orders = [[loader.window_of(epoch * 142 + i) for i in range(142)] for loader in (first, second) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_machine_and_version():
    assert [shuffled(i, 10, b"0:0") for i in range(10)] == [7, 1, 3, 2, 4, 0, 9, 5, 6, 8]


def test_state_of_other_data_seed_or_length_is_refused(data, tmp_path):
    other = shards.write(tmp_path / "other", [list(range(100))], 1000)
    state = Loader(data, LENGTH, 2, seed=0).state_dict()
    for loader, key in [
        (Loader(other, LENGTH, 2, seed=0), "data"),
        (Loader(data, LENGTH + 1, 2, seed=0), "sequence_length"),
        (Loader(data, LENGTH, 2, seed=1), "seed"),
    ]:
        with pytest.raises(InputError, match=f"{key} is"):
            loader.load_state_dict(state)
    with pytest.raises(InputError, match="sample"):
        Loader(data, LENGTH, 2, seed=0).load_state_dict({**state, "sample": -1})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((1000, 2, 0), "1000 tokens are too few"),
        ((0, 2, 0), "sequence_length=0"),
        ((LENGTH, 3, 0, 0, 2), "batch_size=3 must divide by 2"),
        ((LENGTH, 0, 0), "batch_size=0"),
        ((LENGTH, 4, 0, 2, 2), "dp_rank=2"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, arguments, problem):
    with pytest.raises(InputError, match=problem):
        Loader(data, *arguments)


def test_exactly_one_window_is_enough(tmp_path):
    tiny = shards.write(tmp_path / "tiny", [[5, 6, 7]], 10)
    loader = Loader(tiny, 2, 2, seed=0)
    assert next(loader).ids.tolist() == [[5, 6], [5, 6]]
