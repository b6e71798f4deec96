"""A batch keeps its tensors aligned, and its micro-batches are its rows."""

import pytest
import torch

from benthic.base.batch import IGNORE, Batch


def _batch(rows: int = 4, length: int = 6) -> Batch:
    ids = torch.arange(rows * length).view(rows, length)
    labels = torch.where(ids % 3 == 0, IGNORE, ids + 1)
    return Batch(ids, labels, positions=ids % length, segments=torch.ones_like(ids), extra={"advantages": ids.float()})


def test_chunks_put_together_are_the_batch():
    batch = _batch()
    chunks = batch.chunks(2)
    for name in ("ids", "labels", "positions", "segments"):
        assert torch.equal(torch.cat([getattr(c, name) for c in chunks]), getattr(batch, name))
    assert torch.equal(torch.cat([c.extra["advantages"] for c in chunks]), batch.extra["advantages"])
    assert sum(c.targets() for c in chunks) == batch.targets() == 16


def test_cat_undoes_chunks():
    batch = _batch()
    again = Batch.cat(batch.chunks(4))
    for name in ("ids", "labels", "positions", "segments"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert torch.equal(again.extra["advantages"], batch.extra["advantages"])


def test_cat_of_bare_batches_stays_bare():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    again = Batch.cat([Batch(ids, ids), Batch(ids + 1, ids)])
    assert again.ids.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert again.positions is None
    assert again.extra == {}


def test_to_moves_every_tensor():
    moved = _batch().to("meta")
    tensors = [moved.ids, moved.labels, moved.positions, moved.segments, moved.extra["advantages"]]
    assert {t.device.type for t in tensors if t is not None} == {"meta"}


def test_targets_count_the_positions_with_loss():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    labels = torch.tensor([[5, IGNORE, 0], [IGNORE, IGNORE, 7]])
    assert Batch(ids, labels).targets().item() == 3
    assert Batch(ids, torch.full_like(ids, IGNORE)).targets().item() == 0


def test_optional_tensors_stay_absent():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for chunk in Batch(ids, ids).chunks(2):
        assert chunk.positions is None
        assert chunk.segments is None
        assert chunk.to("cpu").extra == {}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 rows do not divide into 3"):
        _batch().chunks(3)


@pytest.mark.parametrize("name", ["labels", "positions", "advantages"])
def test_a_tensor_of_another_shape_is_refused_by_name(name):
    ids, wrong = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    named = {"labels": ids} | ({name: wrong} if name != "advantages" else {"extra": {name: wrong.float()}})
    with pytest.raises(ValueError, match=rf"Batch\.{name} has shape \(2, 4\)"):
        Batch(ids, **named)
