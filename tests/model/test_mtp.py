"""Multi-token prediction: what it reads, in which order, and what it is asked to predict."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benthic.base.batch import IGNORE, Batch
from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig
from benthic.inference.engine import Engine
from benthic.model import count, hf
from benthic.model.block import Context
from benthic.model.config import ModelConfig
from benthic.model.gate import Gate
from benthic.model.mtp import paper_order
from benthic.model.transformer import Transformer
from benthic.train.config import TrainConfig
from benthic.train.loss import LanguageModelling, next_ids, shifted_labels


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


def stream(rows: int, tokens: int) -> Batch:
    """Pretraining rows: labels are the ids one later."""
    ids = ids_of(rows, tokens + 1)
    return Batch(ids=ids[:, :-1], labels=ids[:, 1:])


@torch.no_grad()
def further(model: Transformer, ids: Tensor, next_: Tensor) -> Tensor:
    return model.mtp_hidden(model.hidden(ids)[0], next_)[0]


def eh_proj(model: Transformer) -> tuple[Tensor, Tensor]:
    """The two halves of the projection's input columns."""
    weight = model.mtp[0].eh_proj.weight
    return weight[:, : model.config.hidden_size], weight[:, model.config.hidden_size :]


@torch.no_grad()
def test_the_first_half_of_eh_proj_reads_the_embedding(model: Transformer) -> None:
    _, second = eh_proj(model)
    second.zero_()
    ids, next_ = ids_of(2, 8), ids_of(2, 8).flip(1)
    assert torch.equal(further(model, ids, next_), further(model, (ids + 1) % 61, next_))  # blind to the hidden state
    assert not torch.allclose(further(model, ids, next_), further(model, ids, (next_ + 1) % 61))


@torch.no_grad()
def test_the_second_half_of_eh_proj_reads_the_hidden_state(model: Transformer) -> None:
    first, _ = eh_proj(model)
    first.zero_()
    ids, next_ = ids_of(2, 8), ids_of(2, 8).flip(1)
    assert torch.equal(further(model, ids, next_), further(model, ids, (next_ + 1) % 61))  # blind to the next token
    assert not torch.allclose(further(model, ids, next_), further(model, (ids + 1) % 61, next_))


@torch.no_grad()
def test_swapping_the_halves_equals_swapping_the_inputs(model: Transformer) -> None:
    """Released weights put the embedding first, the paper prints it second: the halves tell the two apart."""
    ids, next_, module = ids_of(1, 6), ids_of(1, 6).flip(1), model.mtp[0]
    hidden, embeds = model.hidden(ids)[0], model.embed(next_)
    expected = module.eh_proj(torch.cat((module.enorm(embeds), module.hnorm(hidden)), -1))
    seen: list[Tensor] = []
    module.block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    context = Context.of(model.config, ids, None, None, None)
    module(hidden, embeds, context)
    first, second = (half.clone() for half in eh_proj(model))
    module.eh_proj.weight.copy_(torch.cat((second, first), 1))
    module(hidden, embeds, context)  # halves swapped: another h'
    module.enorm.weight.data, module.hnorm.weight.data = module.hnorm.weight.data, module.enorm.weight.data
    module(embeds, hidden, context)  # inputs swapped too: the first h' again
    torch.testing.assert_close(seen[0], expected)
    assert (seen[1] - expected).abs().max() > 0.1
    torch.testing.assert_close(seen[2], expected)


@torch.no_grad()
def test_position_i_reads_token_i_plus_1_and_nothing_later(model: Transformer) -> None:
    """t_{i+1} moves h'_i, t_{i+2} does not; in one row of ids, as the objective feeds it."""
    batch, at = stream(1, 12), 5
    changed = batch.ids.clone()
    changed[0, at] = (changed[0, at] + 1) % 61
    a = further(model, batch.ids, next_ids(batch, 0))
    b = further(model, changed, next_ids(Batch(ids=changed, labels=batch.labels), 0))
    moved = (a - b).abs().amax(-1)[0] > 1e-5  # [T]
    assert moved.tolist() == [i + 1 >= at for i in range(12)]


@torch.no_grad()
def test_changing_only_the_next_token_changes_this_position_and_later_ones(model: Transformer) -> None:
    ids, next_ = ids_of(1, 10), ids_of(1, 10).roll(-1, 1)
    other = next_.clone()
    other[0, 4] = (other[0, 4] + 1) % 61
    moved = (further(model, ids, next_) - further(model, ids, other)).abs().amax(-1)[0] > 1e-5
    assert moved.tolist() == [i >= 4 for i in range(10)]


@torch.no_grad()
def test_its_output_is_already_normed_for_the_shared_head(model: Transformer) -> None:
    hidden = further(model, ids_of(2, 5), ids_of(2, 5))
    unit = hidden / model.mtp[0].shared_head.norm.weight
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(2, 5), atol=1e-4, rtol=1e-4)


def test_embedding_and_head_are_shared_with_the_main_model(model: Transformer) -> None:
    names = [name for name, _ in model.mtp.named_parameters()]
    assert not [name for name in names if "embed" in name or "lm_head" in name or "head.weight" in name]
    hidden, ids = model.hidden(ids_of(1, 4))[0].detach(), ids_of(1, 4)
    model.logits(model.mtp_hidden(hidden, ids)[0]).logsumexp(-1).sum().backward()
    assert model.embed_tokens.weight.grad is not None
    assert model.lm_head.weight.grad is not None


def test_next_ids_are_the_tokens_further_on_of_a_pretraining_row() -> None:
    batch = Batch(ids=torch.tensor([[10, 11, 12, 13]]), labels=torch.tensor([[11, 12, 13, 14]]))
    assert next_ids(batch, 0).tolist() == [[11, 12, 13, 14]]
    assert next_ids(batch, 1).tolist() == [[12, 13, 14, 0]]
    assert next_ids(batch, 2).tolist() == [[13, 14, 0, 0]]


def test_next_ids_read_the_input_even_where_labels_carry_no_loss() -> None:
    batch = Batch(ids=torch.tensor([[10, 11, 12, 13]]), labels=torch.tensor([[IGNORE, IGNORE, 13, IGNORE]]))
    assert next_ids(batch, 0).tolist() == [[11, 12, 13, 0]]


def test_shifted_labels_are_the_labels_further_on() -> None:
    batch = Batch(ids=torch.tensor([[10, 11, 12, 13]]), labels=torch.tensor([[11, 12, 13, 14]]))
    assert shifted_labels(batch, 1).tolist() == [[12, 13, 14, IGNORE]]
    assert shifted_labels(batch, 2).tolist() == [[13, 14, IGNORE, IGNORE]]
    masked = Batch(ids=batch.ids, labels=torch.tensor([[IGNORE, IGNORE, 13, 14]]))
    assert shifted_labels(masked, 1).tolist() == [[IGNORE, 13, 14, IGNORE]]


def test_shifted_labels_never_cross_documents_or_reach_padding() -> None:
    batch = Batch(
        ids=torch.tensor([[10, 11, 12, 20, 21, 22, 0]]),
        labels=torch.tensor([[11, 12, IGNORE, 21, 22, 23, IGNORE]]),
        positions=torch.tensor([[0, 1, 2, 0, 1, 2, 0]]),
        segments=torch.tensor([[1, 1, 1, 2, 2, 2, 0]]),
    )
    assert shifted_labels(batch, 1).tolist() == [[12, IGNORE, IGNORE, 22, 23, IGNORE, IGNORE]]
    assert shifted_labels(batch, 2).tolist() == [[IGNORE, IGNORE, IGNORE, 23, IGNORE, IGNORE, IGNORE]]


def test_where_a_label_is_asked_for_the_next_id_is_known() -> None:
    """Every position with an MTP loss reads the true token in between, never the filler."""
    batch = stream(2, 9)
    for depth in range(3):
        asked = shifted_labels(batch, depth + 1) != IGNORE
        row = torch.cat((batch.ids, batch.labels[:, -1:]), 1)
        for b, i in asked.nonzero().tolist():
            assert next_ids(batch, depth)[b, i] == row[b, i + 1 + depth]


def mtp_loss(model: Transformer, batch: Batch) -> float:
    config = TrainConfig(
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=10,
        learning_rate=1e-3,
        mtp_loss_weight=0.5,
        balance_loss_weight=0.0,
    )
    objective = LanguageModelling(config)
    return objective(model, batch, objective.targets(model, batch)).metrics["mtp_loss"].item()


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2])
def test_the_objective_chains_the_modules_from_the_normed_hidden_state(
    tiny: ModelConfig, build: Callable[..., Transformer], depths: int
) -> None:
    """V3 Eq 24-25 by hand: mean over depths, each over its own tokens, h^0 after the final norm."""
    model, batch = build(dataclasses.replace(tiny, num_nextn_predict_layers=depths)), stream(2, 10)
    row = torch.cat((batch.ids, batch.labels[:, -1:]), 1)  # [B, T + 1]
    hidden, total = model.hidden(batch.ids)[0], 0.0
    for k in range(1, depths + 1):
        length = 10 - k
        filler = torch.zeros(2, k - 1, dtype=torch.int64)
        hidden = model.mtp_hidden(hidden, torch.cat((row[:, k:], filler), 1), depth=k - 1)[0]
        logprobs = model.logits(hidden)[:, :length].log_softmax(-1)
        total -= logprobs.gather(2, row[:, k + 1 :].unsqueeze(2)).sum().item() / (2 * length * depths)
    assert mtp_loss(model, batch) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_paper_order_turns_eh_proj_into_the_printed_projection_and_back(model: Transformer) -> None:
    """V3 Eq 21 multiplies M_k with [RMSNorm(h); RMSNorm(Emb)]; the released weight takes them the other way round."""
    module, generator = model.mtp[0], torch.Generator().manual_seed(0)
    h, emb = torch.randn(2, 3, model.config.hidden_size, generator=generator).unbind(0)
    released = module.eh_proj(torch.cat((emb, h), -1))
    printed = torch.cat((h, emb), -1) @ paper_order(module.eh_proj.weight).T
    torch.testing.assert_close(released, printed)
    assert torch.equal(paper_order(paper_order(module.eh_proj.weight)), module.eh_proj.weight)


PARALLEL = {"mtp_type": "parallel", "num_nextn_predict_layers": 2}


@torch.no_grad()
def test_parallel_heads_read_the_trunk_alone(tiny: ModelConfig, build: Callable[..., Transformer]) -> None:
    """Gloeckle et al. 2024: head k is one layer on the shared trunk, blind to the tokens in between."""
    model, ids = build(dataclasses.replace(tiny, **PARALLEL)), ids_of(2, 7)
    trunk = model.trunk(ids)
    x = model.embed(ids)
    for layer in model.layers[:-1]:
        x, _ = layer(x, trunk.context)
    assert torch.equal(trunk.x, x)
    assert torch.equal(model.mtp_input(trunk, model.top(trunk)[0]), x)
    for k, head in enumerate(model.mtp):
        expected = head.shared_head.norm(head.block(x, trunk.context)[0])
        found = [model.mtp_hidden(x, next_, depth=k)[0] for next_ in (ids, ids.flip(1))]
        assert torch.equal(found[0], expected)
        assert torch.equal(found[0], found[1])


def test_parallel_heads_train_towards_tokens_two_and_three_ahead(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    model, batch = build(dataclasses.replace(tiny, **PARALLEL)), stream(2, 10)
    row = torch.cat((batch.ids, batch.labels[:, -1:]), 1)
    with torch.no_grad():
        trunk, total = model.trunk(batch.ids), 0.0
        for k in (1, 2):
            logprobs = model.logits(model.mtp_hidden(trunk.x, batch.ids, depth=k - 1)[0])[:, : 10 - k].log_softmax(-1)
            total -= logprobs.gather(2, row[:, k + 1 :].unsqueeze(2)).mean().item() / 2
    assert mtp_loss(model, batch) == pytest.approx(total, rel=1e-5)


def test_parallel_heads_have_no_projection_and_are_counted_without(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    config = dataclasses.replace(tiny, **PARALLEL)
    model = build(config)
    held = sum(p.numel() for p in model.mtp.parameters()) + sum(
        g.e_score_correction_bias.numel() for m in model.mtp for g in m.modules() if isinstance(g, Gate)
    )
    assert (
        held == count.parameters(config).mtp < count.parameters(dataclasses.replace(config, mtp_type="sequential")).mtp
    )
    assert not any("eh_proj" in name for name, _ in model.mtp.named_parameters())


def test_parallel_heads_survive_a_round_trip_and_do_not_draft(tiny, build, tmp_path) -> None:
    model = build(dataclasses.replace(tiny, **PARALLEL))
    hf.write_model(tmp_path / "m", model, None)
    again, _ = hf.load(tmp_path / "m", device="cpu")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(InputError, match="num_speculative_tokens"):
        Engine(again, None, EngineConfig(num_speculative_tokens=1))
