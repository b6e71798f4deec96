"""Decoding from the latent cache equals training's expanded form."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benthic.model.cache import CacheView, LatentCache
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer

SLOTS = 200
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 61, (n,), generator=generator) for n in lengths]


def scattered(lengths: list[int]) -> list[Tensor]:
    """Slots of each row in no order at all; slot 0 belongs to nobody."""
    free = torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(5)) + 1
    return list(free[: sum(lengths)].split(lengths))


def padded(rows: list[Tensor], width: int, fill: list[int]) -> Tensor:
    out = torch.tensor(fill).unsqueeze(1).expand(len(rows), width).clone()
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Decoding:
    """Feeds rows chunk by chunk through the cache; collects the hidden states of real tokens.

    Padding tokens have id 0, position 0 and slot 0. Past the end of a row its table names slot 0 or its first slot.
    """

    def __init__(self, model: Transformer, rows: list[Tensor], table_padding: str = "slot 0") -> None:
        self.model, self.rows = model, rows
        self.slots = scattered([len(row) for row in rows])
        self.fill = [0 if table_padding == "slot 0" else int(own[0]) for own in self.slots]
        self.cache = LatentCache(model.config, SLOTS, "cpu", torch.float32)
        self.done = [0] * len(rows)
        self.hidden: list[list[Tensor]] = [[] for _ in rows]
        self.mtp_hidden: list[list[list[Tensor]]] = [[[] for _ in model.mtp] for _ in rows]  # row, depth, chunk

    def used(self) -> Tensor:
        return torch.cat(self.slots)

    def feed(self, counts: list[int]) -> None:
        """Take the next counts[i] tokens of row i, or as many as are left."""
        spans = [slice(a, min(a + n, len(r))) for a, n, r in zip(self.done, counts, self.rows)]
        width = max(span.stop - span.start for span in spans)
        nothing = [0] * len(self.rows)
        ids = padded([row[span] for row, span in zip(self.rows, spans)], width, nothing)
        positions = padded([torch.arange(span.start, span.stop) for span in spans], width, nothing)
        write = padded([own[span] for own, span in zip(self.slots, spans)], width, nothing)
        context = max(span.stop for span in spans)
        table = padded([own[: span.stop] for own, span in zip(self.slots, spans)], context, self.fill)
        view = CacheView(self.cache, write, table)
        hidden, _ = self.model.hidden(ids, positions, cache=view)
        for i, span in enumerate(spans):
            self.hidden[i].append(hidden[i, : span.stop - span.start])
            self.done[i] = span.stop
        for depth in range(len(self.model.mtp)):
            after = padded([row.roll(-1 - depth)[span] for row, span in zip(self.rows, spans)], width, nothing)
            hidden, _ = self.model.mtp_hidden(hidden, after, positions, cache=view, depth=depth)
            for i, span in enumerate(spans):
                self.mtp_hidden[i][depth].append(hidden[i, : span.stop - span.start])

    def run(self, chunks: list[list[int]]) -> None:
        for counts in chunks:
            self.feed(counts)
        assert self.done == [len(row) for row in self.rows]


@torch.no_grad()
def check(model: Transformer, decoding: Decoding) -> None:
    """Every row equals the expanded pass over that row alone, main model and MTP modules."""
    for i, row in enumerate(decoding.rows):
        hidden, _ = model.hidden(row.unsqueeze(0))
        torch.testing.assert_close(torch.cat(decoding.hidden[i]), hidden[0], **TOLERANCE)
        for depth, chunks in enumerate(decoding.mtp_hidden[i]):
            hidden, _ = model.mtp_hidden(hidden, row.roll(-1 - depth).unsqueeze(0), depth=depth)
            torch.testing.assert_close(torch.cat(chunks), hidden[0], **TOLERANCE)


@torch.no_grad()
def test_token_by_token_equals_expanded(model: Transformer) -> None:
    decoding = Decoding(model, prompts(23))
    decoding.run([[1]] * 23)
    check(model, decoding)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[23], [7, 16], [1, 5, 2, 11, 1, 3], [22, 1]], ids=str)
def test_uneven_chunks_equal_expanded(model: Transformer, chunks: list[int]) -> None:
    decoding = Decoding(model, prompts(23))
    decoding.run([[n] for n in chunks])
    check(model, decoding)


@torch.no_grad()
@pytest.mark.parametrize("table_padding", ["slot 0", "first slot"])
def test_rows_of_different_lengths_in_one_batch_equal_each_row_alone(model: Transformer, table_padding: str) -> None:
    decoding = Decoding(model, prompts(13, 4, 9, 1), table_padding)
    decoding.run([[5, 2, 1, 1], [1, 1, 6, 0], [6, 1, 0, 0], [1, 0, 2, 0]])
    check(model, decoding)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"first_k_dense_replace": 0},
        {"num_attention_heads": 1, "num_nextn_predict_layers": 0},
        {"v_head_dim": 4, "qk_nope_head_dim": 16, "kv_lora_rank": 64},
        {"num_nextn_predict_layers": 2, "qk_rope_head_dim": 2},
    ],
    ids=str,
)
def test_other_shapes_decode_equally(
    tiny: ModelConfig, build: Callable[..., Transformer], change: dict[str, int]
) -> None:
    model = build(dataclasses.replace(tiny, **change))
    decoding = Decoding(model, prompts(8, 3))
    decoding.run([[3, 1], [1, 2], [4, 0]])
    check(model, decoding)


def fill(cache: LatentCache, slots: Tensor | slice, value: float) -> None:
    for layer in cache.layers:
        layer.c_kv[slots], layer.k_rope[slots] = value, value


@torch.no_grad()
def test_slots_that_belong_to_nobody_are_never_read_even_if_they_hold_nan(model: Transformer) -> None:
    decoding = Decoding(model, prompts(9, 5), table_padding="first slot")
    poisoned = torch.ones(SLOTS, dtype=torch.bool)
    poisoned[decoding.used()] = False
    fill(decoding.cache, poisoned, torch.nan)  # slot 0 too: its only readers are padding tokens
    decoding.run([[4, 1], [5, 4]])
    check(model, decoding)


@torch.no_grad()
def test_slots_of_other_rows_are_never_read_even_if_they_hold_nan(model: Transformer) -> None:
    decoding = Decoding(model, prompts(9, 5), table_padding="first slot")
    decoding.feed([4, 5])
    fill(decoding.cache, decoding.slots[1], torch.nan)  # row 1 is finished; row 0 goes on beside its padding
    decoding.rows, decoding.slots, decoding.fill = decoding.rows[:1], decoding.slots[:1], decoding.fill[:1]
    decoding.done, first = decoding.done[:1], decoding.hidden[0]
    decoding.feed([5])
    assert len(first) == 2
    check(model, decoding)


@torch.no_grad()
def test_positions_after_the_token_are_masked_whatever_their_slots_hold(model: Transformer) -> None:
    (row,) = prompts(10)
    decoding = Decoding(model, [row])
    fill(decoding.cache, slice(None), 1e4)  # stale latents of an earlier owner
    decoding.feed([6])
    whole = decoding.slots[0].unsqueeze(0)  # the table already names the four slots that are still to come
    view = CacheView(decoding.cache, whole[:, 6:7], whole)
    hidden, _ = model.hidden(row[None, 6:7], torch.tensor([[6]]), cache=view)
    expected, _ = model.hidden(row[None, :7])
    torch.testing.assert_close(hidden[0, 0], expected[0, 6], **TOLERANCE)


@torch.no_grad()
def test_the_cache_is_really_read(model: Transformer) -> None:
    decoding = Decoding(model, prompts(6))
    decoding.feed([5])
    for layer in decoding.cache.layers:
        layer.c_kv[decoding.slots[0][2]] += 1
    decoding.feed([1])
    with pytest.raises(AssertionError):
        check(model, decoding)


@torch.no_grad()
def test_each_layer_owns_one_row_of_the_cache_and_writes_nothing_else(model: Transformer) -> None:
    decoding = Decoding(model, prompts(7))
    decoding.run([[7]])
    layers, c = decoding.cache.layers, model.config
    assert len(layers) == c.num_hidden_layers + c.num_nextn_predict_layers
    assert all(x.c_kv.shape == (SLOTS, c.kv_lora_rank) and x.k_rope.shape == (SLOTS, 4) for x in layers)
    written = [(x.c_kv.abs().sum(-1) > 0) & (x.k_rope.abs().sum(-1) > 0) for x in layers]  # [layers][slots]
    expected = torch.zeros(SLOTS, dtype=torch.bool)
    expected[decoding.used()] = True
    assert all(torch.equal(row, expected) for row in written)


@torch.no_grad()
def test_a_bfloat16_cache_stays_close(model: Transformer) -> None:
    decoding = Decoding(model, prompts(12))
    decoding.cache = LatentCache(model.config, SLOTS, "cpu", torch.bfloat16)
    decoding.run([[4], [8]])
    expected, _ = model.hidden(decoding.rows[0].unsqueeze(0))
    error = (torch.cat(decoding.hidden[0]) - expected[0]).norm() / expected[0].norm()
    assert 1e-4 < error < 0.1
