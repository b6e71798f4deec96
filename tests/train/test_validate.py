"""Held-out loss: every token but the first is predicted once, from its own window."""

import math

import numpy as np
import pytest
import torch
from training_example import fresh_model

from benthic.base.errors import InputError
from benthic.train.validate import bits_per_byte, held_out_loss


class Tokens:
    """What `held_out_loss` needs of token shards."""

    def __init__(self, count: int):
        self.ids = np.random.default_rng(0).integers(0, 64, count).astype("uint16")
        self.num_tokens = count

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.num_tokens
        return self.ids[start:stop]


@pytest.mark.parametrize("count", [9, 33, 36, 41])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_mean_is_that_of_every_token_of_every_whole_window(count, rows):
    model, shards, length = fresh_model(), Tokens(count), 8
    windows = (count - 1) // length
    ids = torch.from_numpy(shards.ids.astype("int64"))
    total, mtp = 0.0, 0.0
    with torch.no_grad():
        for w in range(windows):
            window, wanted = ids[w * length : (w + 1) * length], ids[w * length + 1 : (w + 1) * length + 1]
            hidden, _ = model.hidden(window[None])
            total -= model.logits(hidden)[0].log_softmax(-1)[torch.arange(length), wanted].sum().item()
            ahead, _ = model.mtp_hidden(hidden, wanted[None])
            mtp -= model.logits(ahead)[0, :-1].log_softmax(-1)[torch.arange(length - 1), wanted[1:]].sum().item()
    model.train()
    values = held_out_loss(model, shards, length, rows)  # type: ignore[arg-type]
    assert values["heldout_tokens"] == windows * length
    assert values["heldout_loss"] == pytest.approx(total / (windows * length), rel=1e-5)
    assert values["heldout_mtp_loss"] == pytest.approx(mtp / (windows * (length - 1)), rel=1e-5)
    assert model.training


def test_max_windows_reads_only_so_many_evenly_spread(monkeypatch):
    shards, read = Tokens(100), []
    monkeypatch.setattr(shards, "read", lambda a, b: read.append((a, b)) or shards.ids[a:b])
    few = held_out_loss(fresh_model(), shards, 8, 2, max_windows=3)  # type: ignore[arg-type]
    assert read == [(0, 9), (32, 41), (64, 73)]  # windows 0, 4 and 8 of 12
    assert few["heldout_tokens"] == 24
    assert held_out_loss(fresh_model(), shards, 8, 2, max_windows=99)["heldout_tokens"] == 96  # type: ignore[arg-type]


def test_the_violation_is_that_of_the_load_over_all_windows_not_a_mean_over_batches():
    model, shards, length = fresh_model(), Tokens(65), 8
    ids = torch.from_numpy(shards.ids.astype("int64"))[:64].view(8, length)
    with torch.no_grad():
        (choice,) = model.hidden(ids)[1]
    load = torch.bincount(choice.topk_ids.reshape(-1), minlength=model.config.n_routed_experts).float()
    expected = (load.max() / load.mean() - 1).item()
    for rows in (1, 3, 8):
        values = held_out_loss(model, shards, length, rows)  # type: ignore[arg-type]
        assert values["heldout_max_violation"] == pytest.approx(expected, rel=1e-6)


def test_text_of_less_than_one_window_is_refused():
    with pytest.raises(InputError, match="8 held-out tokens are less than one window of 8"):
        held_out_loss(fresh_model(), Tokens(8), 8, 2)  # type: ignore[arg-type]


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 50, 100) == pytest.approx(4)
