import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benthic.model.block import Context
from benthic.model.config import ModelConfig
from benthic.model.gate import Choice
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("at", [1, 7, 15])
def test_a_changed_token_leaves_every_earlier_logit_alone_and_moves_the_later_ones(model: Transformer, at: int) -> None:
    ids = ids_of(2, 16)
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % 61
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :at], b[:, :at], **CLOSE)
    assert ((a - b)[:, at:].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_a_longer_row_begins_with_the_logits_of_the_shorter(model: Transformer) -> None:
    ids = ids_of(1, 20)
    torch.testing.assert_close(model(ids)[:, :13], model(ids[:, :13]), **CLOSE)


@torch.no_grad()
def test_rows_do_not_see_each_other(model: Transformer) -> None:
    ids = ids_of(3, 10)
    torch.testing.assert_close(model(ids)[1:2], model(ids[1:2]), **CLOSE)


@torch.no_grad()
def test_the_order_of_tokens_matters(model: Transformer) -> None:
    ids = torch.tensor([[5, 9, 3, 7], [9, 5, 3, 7]])
    out = model(ids)
    assert (out[0, -1] - out[1, -1]).abs().max() > 1e-3


def packed(documents: list[Tensor], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions, segments [1, T] of documents one after the other; padding is segment 0."""
    ids = torch.cat([*documents, torch.zeros(padding, dtype=torch.int64)])
    positions = torch.cat([*(torch.arange(len(d)) for d in documents), torch.zeros(padding, dtype=torch.int64)])
    segments = [torch.full((len(d),), i + 1) for i, d in enumerate(documents)]
    return ids[None], positions[None], torch.cat([*segments, torch.zeros(padding, dtype=torch.int64)])[None]


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_packed_documents_equal_each_document_alone(model: Transformer, padding: int) -> None:
    documents = [ids_of(1, n, seed=n)[0] for n in (5, 1, 8)]
    ids, positions, segments = packed(documents, padding)
    hidden, choices = model.hidden(ids, positions, segments)
    further, _ = model.mtp_hidden(hidden, ids.roll(-1, 1), positions, segments)
    start = 0
    for document in documents:
        end = start + len(document)
        alone, _ = model.hidden(document[None])
        torch.testing.assert_close(hidden[:, start:end], alone, **CLOSE)
        next_ids = ids.roll(-1, 1)[:, start:end]
        torch.testing.assert_close(further[:, start:end], model.mtp_hidden(alone, next_ids)[0], **CLOSE)
        start = end
    assert hidden.isfinite().all()
    assert [len(c.topk_ids) for c in choices] == [len(ids[0])] * 2


@torch.no_grad()
def test_without_segments_documents_see_their_neighbours(model: Transformer) -> None:
    documents = [ids_of(1, n, seed=n)[0] for n in (5, 8)]
    ids, positions, _ = packed(documents, 0)
    joined, _ = model.hidden(ids, positions)
    alone, _ = model.hidden(documents[1][None])
    assert (joined[:, 5:] - alone).abs().max() > 1e-2


def test_no_gradient_crosses_from_one_document_to_another(model: Transformer) -> None:
    ids, positions, segments = packed([ids_of(1, 4, seed=1)[0], torch.full((4,), 60)], 0)
    ids[ids == 60] = 59
    ids[0, 4:] = 60  # the second document's token occurs nowhere else
    hidden, _ = model.hidden(ids, positions, segments)
    hidden[0, :4].square().sum().backward()
    assert not model.embed_tokens.weight.grad[60].any()


@torch.no_grad()
def test_logits_are_float32_whatever_the_arithmetic(tiny: ModelConfig, build: Callable[..., Transformer]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build(tiny, dtype=dtype)
        assert model(ids_of(1, 4)).dtype == torch.float32
        assert model.hidden(ids_of(1, 4))[0].dtype == dtype
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize(("dense_layers", "bound"), [(3, 0.02), (1, 0.1)], ids=["dense", "mixture"])
def test_bfloat16_arithmetic_stays_close_to_float32(
    tiny: ModelConfig, build: Callable[..., Transformer], dense_layers: int, bound: float
) -> None:
    """A mixture may also choose other experts when two are almost equal, so its bound is wider."""
    config = dataclasses.replace(tiny, first_k_dense_replace=dense_layers)
    exact, coarse = build(config), build(config, dtype=torch.bfloat16)
    ids = ids_of(2, 32)
    a, b = exact(ids), coarse(ids)
    error = (a - b).norm() / a.norm()
    assert 1e-4 < error < bound


@torch.no_grad()
def test_bfloat16_weights_and_arithmetic_equal_bfloat16_arithmetic_on_masters_of_those_weights(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    masters = build(tiny, dtype=torch.bfloat16)
    for parameter in masters.parameters():
        parameter.copy_(parameter.bfloat16())
    half = build(tiny, dtype=torch.bfloat16).bfloat16()
    ids = ids_of(1, 12)
    torch.testing.assert_close(masters(ids), half(ids), atol=0.02, rtol=0.02)


def test_every_parameter_gets_a_gradient_and_all_are_finite(model: Transformer) -> None:
    ids = ids_of(4, 24)
    hidden, _ = model.hidden(ids)
    further, _ = model.mtp_hidden(hidden, ids.roll(-1, 1))
    (model.logits(hidden).logsumexp(-1).sum() + model.logits(further).logsumexp(-1).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_first_layers_are_dense_and_the_rest_are_mixtures(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    for dense in range(4):
        model = build(dataclasses.replace(tiny, first_k_dense_replace=dense))
        assert [isinstance(layer.mlp, MoE) for layer in model.layers] == [i >= dense for i in range(3)]
        assert isinstance(model.mtp[0].block.mlp, MoE)


@torch.no_grad()
def test_choices_come_in_the_order_of_the_gates(model: Transformer) -> None:
    ids = ids_of(1, 6)
    hidden, choices = model.hidden(ids)
    _, last = model.mtp_hidden(hidden, ids)
    assert isinstance(last, Choice)
    seen: list[Tensor] = []
    for gate in model.gates():
        gate.register_forward_hook(lambda module, args, out: seen.append(out.scores))
    model.mtp_hidden(model.hidden(ids)[0], ids)
    assert [torch.equal(a, c.scores) for a, c in zip(seen, [*choices, last])] == [True] * 3
    for gate, choice in zip(model.gates(), [*choices, last]):  # zeroing one gate flattens exactly its own scores
        kept = gate.weight.clone()
        gate.weight.zero_()
        hidden, again = model.hidden(ids)
        again.append(model.mtp_hidden(hidden, ids)[1])
        flat = [bool((c.scores == 0.5).all()) for c in again]
        assert flat == [other is choice for other in [*choices, last]]
        gate.weight.copy_(kept)


@torch.no_grad()
def test_a_pass_leaves_no_trace_in_the_model(model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model(ids_of(2, 9))
    model.train()
    model(ids_of(3, 5, seed=1))
    model.eval()
    assert torch.equal(model(ids_of(2, 9)), first)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_block_in_four_phases_equals_its_forward(model: Transformer) -> None:
    x = torch.randn(2, 5, model.config.hidden_size)
    context = Context.of(model.config, ids_of(2, 5), None, None, None)
    for block in model.layers:
        halfway = block.attention(x, context)
        sent = block.dispatch(halfway, context)
        whole, _ = block(x, context)
        assert torch.equal(block.combine(halfway, sent, block.experts(sent))[0], whole)
