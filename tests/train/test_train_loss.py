"""The chunked loss equals the plain one, and the objective equals the paper's equations computed another way."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_example import MODEL, Stream, fresh_model, settings

from benthic.base.batch import IGNORE, Batch
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer
from benthic.train import loss as room
from benthic.train.loss import LanguageModelling, label_logprobs, next_ids, shifted_labels, token_logprobs

V, D = 50, 6


def _inputs(n: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, D, generator=g) * 2, torch.randn(V, D, generator=g)
    upstream = torch.randn(n, generator=g)
    return hidden.to(dtype), weight, torch.randint(0, V, (n,), generator=g), upstream


def _plain(hidden, weight, targets, upstream):
    """Values and gradients in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = (hidden @ weight.T).log_softmax(-1)[torch.arange(len(targets)), targets]
    return logprobs, *torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))


@pytest.mark.parametrize("n", [1, 6, 7, 8, 13, 14, 15, 20])
def test_token_logprobs_and_gradients_equal_float64_across_chunk_borders(monkeypatch, n):
    monkeypatch.setattr(room, "CHUNK", 7)
    hidden, weight, targets, upstream = _inputs(n)
    expected = _plain(hidden, weight, targets, upstream)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs = token_logprobs(hidden, weight, targets)
    got = (logprobs, *torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight)))
    assert logprobs.dtype == torch.float32
    for value, reference in zip(got, expected):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=2e-6)


def test_bfloat16_hidden_states_keep_float32_logprobs_and_their_own_gradient_dtype(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 7)
    hidden, weight, targets, upstream = _inputs(20, torch.bfloat16)
    expected = _plain(hidden, weight.bfloat16(), targets, upstream)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs = token_logprobs(hidden, weight, targets)
    got = (logprobs, *torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight)))
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32]
    for value, reference in zip(got, expected):
        assert (value.double() - reference).abs().max() < 0.02 * reference.abs().max()


def test_huge_logits_do_not_overflow():
    hidden, weight, targets, _ = _inputs(5)
    assert token_logprobs(hidden * 1e4, weight, targets).isfinite().all()


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    hidden, weight = torch.randn(2, 3, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    logprobs, at = label_logprobs(hidden, weight, torch.full((2, 3), IGNORE))
    assert logprobs.shape == at.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()  # type: ignore[union-attr]


class Largest(TorchDispatchMode):
    """Rows of the largest tensor with V columns that any operation makes."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == V:
                self.rows = max(self.rows, t.numel() // V)
        return out


def _largest_rows(logprobs_of) -> int:
    hidden, weight, targets, _ = _inputs(40)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as seen:
        logprobs_of(hidden, weight, targets).sum().backward()
    return seen.rows


def test_no_tensor_of_all_tokens_by_the_vocabulary_ever_exists(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 7)
    assert _largest_rows(token_logprobs) == 7


def test_the_memory_test_sees_the_plain_implementation():
    def plain(h, w, t):
        return (h @ w.T).log_softmax(-1)[torch.arange(len(t)), t]

    assert _largest_rows(plain) == 40


def test_label_logprobs_come_with_their_flat_positions():
    hidden, weight = torch.randn(2, 3, D), torch.randn(V, D)
    labels = torch.tensor([[4, IGNORE, 5], [IGNORE, 6, IGNORE]])
    logprobs, at = label_logprobs(hidden, weight, labels)
    assert at.tolist() == [0, 2, 4]
    full = F.linear(hidden, weight).log_softmax(-1)
    torch.testing.assert_close(logprobs, torch.stack((full[0, 0, 4], full[0, 2, 5], full[1, 1, 6])))


def test_next_ids_are_the_stream_shifted_and_zero_where_it_is_unknown():
    tokens = torch.arange(10, 16).unsqueeze(0)
    batch = Batch(tokens[:, :5], tokens[:, 1:])
    assert next_ids(batch, 0).tolist() == [[11, 12, 13, 14, 15]]
    assert next_ids(batch, 1).tolist() == [[12, 13, 14, 15, 0]]
    assert shifted_labels(batch, 1).tolist() == [[12, 13, 14, 15, IGNORE]]
    assert shifted_labels(batch, 2).tolist() == [[13, 14, 15, IGNORE, IGNORE]]


def test_shifted_labels_stay_in_their_document():
    labels = torch.tensor([[11, 12, IGNORE, 21, 22, IGNORE, IGNORE]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 0]])
    batch = Batch(torch.zeros_like(labels), labels, segments=segments)
    assert shifted_labels(batch, 1).tolist() == [[12, IGNORE, IGNORE, 22, IGNORE, IGNORE, IGNORE]]
    assert (shifted_labels(batch, 2) == IGNORE).all()


# ---- the objective ----------------------------------------------------------------------------------------------


def _independent(model, batch: Batch, weight_mtp: float, weight_balance: float) -> torch.Tensor:
    """V3 Eq 17-20 and 24-25 with loops over rows and tokens, each depth divided by its own number of terms. Every
    document stands alone in its row here."""
    hidden, choices = model.hidden(batch.ids)
    rows, length = batch.ids.shape
    divisor = rows * length  # T of every sequence, and the mean over sequences
    main = torch.zeros(())
    for b in range(rows):
        for i in range(length):
            main = main - model.logits(hidden[b, i]).log_softmax(-1)[batch.labels[b, i]]
    total = main / divisor
    depths = len(model.mtp)
    for k in range(1, depths + 1):
        stream = torch.cat((batch.ids, batch.labels[:, -1:]), 1)  # t_1 .. t_{T+1}
        known = stream[:, k:]  # t_{i+k} of position i
        known = F.pad(known, (0, length - known.shape[1]))[:, :length]
        hidden, choice = model.mtp_hidden(hidden, known, depth=k - 1)
        choices.append(choice)
        loss = torch.zeros(())
        for b in range(rows):
            for i in range(length - k):  # targets t_{2+k} .. t_{T+1}
                loss = loss - model.logits(hidden[b, i]).log_softmax(-1)[stream[b, i + 1 + k]]
        total = total + weight_mtp / depths * loss / (rows * (length - k))
    for choice in choices:
        experts, top = MODEL.n_routed_experts, MODEL.num_experts_per_tok
        scores = choice.scores.view(rows, length, experts)
        for s in scores:
            f = torch.zeros(experts)
            for t in range(length):
                for e in s[t].argsort(descending=True)[:top]:
                    f[e] += experts / (top * length)
            p = (s / s.sum(-1, keepdim=True)).mean(0)
            total = total + weight_balance * (f * p).sum() / rows
    return total


def run(objective: LanguageModelling, model: Transformer, batch: Batch):
    return objective(model, batch, objective.targets(model, batch))


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_the_objective_equals_the_papers_equations_in_loops(depths):
    model = fresh_model(ModelConfig(**{**vars(MODEL), "num_nextn_predict_layers": depths}))
    batch = Stream(rows=2, length=6).batch(0)
    objective = LanguageModelling(settings(mtp_loss_weight=0.3, balance_loss_weight=0.05))
    outcome = objective(model, batch, objective.targets(model, batch))
    expected = _independent(model, batch, 0.3, 0.05)
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-6, atol=1e-6)
    names = [n for n, _ in model.named_parameters()]
    got = torch.autograd.grad(outcome.loss, list(model.parameters()))
    reference = torch.autograd.grad(expected, list(model.parameters()))
    for name, a, b in zip(names, got, reference):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("depths", [1, 3])
def test_each_depth_is_divided_by_its_own_labels(depths):
    model = fresh_model(ModelConfig(**{**vars(MODEL), "num_nextn_predict_layers": depths}))
    batch = Stream(rows=2, length=6).batch(0)
    batch.labels[1, 2:] = IGNORE
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every log-probability is -log V
    outcome = run(LanguageModelling(settings()), model, batch)
    log_v = torch.tensor(64.0).log()
    torch.testing.assert_close(outcome.metrics["loss"], log_v)
    torch.testing.assert_close(outcome.metrics["mtp_loss"], log_v)  # by T as printed it would be less


def test_a_batch_too_short_for_a_depth_costs_nothing_there():
    model, batch = fresh_model(), Stream(rows=2, length=1).batch(0)
    outcome = run(LanguageModelling(settings()), model, batch)
    assert outcome.metrics["mtp_loss"] == 0
    assert outcome.loss.isfinite()


def test_expert_load_counts_every_token_of_every_gate_and_padding_of_none():
    model, batch = fresh_model(), Stream(rows=2, length=6).batch(0)
    load = run(LanguageModelling(settings()), model, batch).expert_load
    assert load.sum(1).tolist() == [2 * 6 * MODEL.num_experts_per_tok] * 2
    batch.segments = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    batch.positions = torch.tensor([[0, 1, 2, 0, 0, 0]] * 2)
    load = run(LanguageModelling(settings()), model, batch).expert_load
    assert load.sum(1).tolist() == [2 * 3 * MODEL.num_experts_per_tok] * 2


def test_without_mtp_weight_the_modules_do_not_run_and_their_gate_counts_nothing():
    model, batch = fresh_model(), Stream(rows=2, length=6).batch(0)
    outcome = run(LanguageModelling(settings(mtp_loss_weight=0.0)), model, batch)
    outcome.loss.backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    assert outcome.metrics["mtp_loss"] == 0
    assert outcome.expert_load[1].sum() == 0


def test_packed_documents_cost_what_they_cost_alone():
    """Two documents in one row, against the same two in rows of their own: the same sums, MTP included."""
    model, objective = fresh_model(), LanguageModelling(settings(balance_loss_weight=0.0))
    a, b = torch.randint(0, 64, (5,)).tolist(), torch.randint(0, 64, (4,)).tolist()
    apart = Batch(
        torch.tensor([a, [*b, 0]]),
        torch.tensor([[*a[1:], IGNORE], [*b[1:], IGNORE, IGNORE]]),
        positions=torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]),
        segments=torch.tensor([[1] * 5, [1] * 4 + [0]]),
    )
    packed = Batch(
        torch.tensor([a + b]),
        torch.tensor([[*a[1:], IGNORE, *b[1:], IGNORE]]),
        positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
        segments=torch.tensor([[1] * 5 + [2] * 4]),
    )
    first, second = (objective(model, x, objective.targets(model, x)) for x in (apart, packed))
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.metrics["mtp_loss"], second.metrics["mtp_loss"], rtol=1e-6, atol=1e-6)
    assert torch.equal(first.expert_load[0], second.expert_load[0])  # the MTP gate also sees what follows a document


@pytest.mark.parametrize(
    "name",
    [
        "batch_balance_loss",
        "expert_balance_loss",
        "device_balance_loss",
        "communication_balance_loss",
        "importance_loss",
    ],
)
def test_a_weighted_balance_loss_is_reported_and_added(name):
    model, batch = fresh_model(), Stream().batch(0)
    targets = LanguageModelling(settings()).targets(model, batch)
    without = LanguageModelling(settings())(model, batch, targets)
    with_it = LanguageModelling(settings(**{f"{name}_weight": 0.5}))(model, batch, targets)
    assert name not in without.metrics
    assert with_it.metrics[name] > 0
    torch.testing.assert_close(with_it.loss - without.loss, 0.5 * with_it.metrics[name])
