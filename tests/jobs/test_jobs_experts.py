"""`benthic experts` on a planted model: what it finds, what it writes, what it refuses."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benthic.base.errors import CheckpointError, InputError
from benthic.jobs import experts
from benthic.jobs.config import ExpertsConfig
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe

TEXT = "How many are 2 and 3? There are 5. Write a poem about the sea: the sea is deep.\n" * 30
NEVER = (2, 7)  # experts that no token reaches, one in each group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and an MTP module of eight experts. 0 and 3 are the same expert, 2 and 7 are never chosen."""
    tokenizer = bpe.train([TEXT], 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = initialise(Transformer(config), std=0.2, seed=0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "mlp.gate.weight" in name or "routed_experts" in name:
                tensor[3] = tensor[0]
        for gate in model.gates():
            gate.e_score_correction_bias[list(NEVER)] = -9.0
    at = tmp_path_factory.mktemp("planted")
    hf.write_model(at / "model", model, tokenizer)
    (at / "text.txt").write_text(TEXT, encoding="utf-8")
    return at


def options(folder: Path, **changes: Any) -> ExpertsConfig:
    return ExpertsConfig(**{"action": "report", "model": folder / "model", "device": "cpu"} | changes)


def with_text(folder: Path, **changes: Any) -> ExpertsConfig:
    return options(folder, **{"corpus": (folder / "text.txt",)} | changes)


def report(config: ExpertsConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    experts.run(dataclasses.replace(config, json=True))
    return json.loads(capsys.readouterr().out)


def stream(folder: Path, length: int) -> Tensor:
    _, tokenizer = hf.load(folder / "model", device="cpu")
    assert tokenizer is not None
    return torch.tensor([tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id])[:length]


def test_the_report_finds_the_planted_twins_and_the_idle_experts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(with_text(folder), capsys)
    assert [layer["layer"] for layer in found["layers"]] == ["layers.1", "layers.2", "mtp.0"]
    for layer in found["layers"]:
        assert layer["idle"] == list(NEVER)
        twins, second = layer["most_alike"][:2]
        assert twins["experts"] == [0, 3]
        assert twins["same_group"]
        for key in ("centroids", "outputs", "weights"):
            assert twins[key] == pytest.approx(1, abs=1e-5)
            assert second[key] < 0.9


@torch.no_grad()
def test_load_and_loss_equal_a_count_over_the_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(with_text(folder, max_tokens=150), capsys)
    model, _ = hf.load(folder / "model", device="cpu")
    ids, chosen, weights, nats = stream(folder, 150), [0] * 8, [0.0] * 8, 0.0
    for first in (0, 64, 128):  # the model's context is 64
        window = ids[first : first + 65]
        hidden, choices = model.hidden(window[None, :-1])
        logprobs = model.logits(hidden)[0].log_softmax(-1)
        nats -= sum(logprobs[i, token].item() for i, token in enumerate(window[1:]))
        for row, gates in zip(choices[0].topk_ids.tolist(), choices[0].weights.tolist()):
            for expert, gate in zip(row, gates):
                chosen[expert] += 1
                weights[expert] += gate
    layer = found["layers"][0]
    assert found["tokens"] == 149
    assert found["bits_per_token"] == pytest.approx(nats / 149 / math.log(2), rel=1e-5)
    assert layer["load"] == pytest.approx([n * 8 / sum(chosen) for n in chosen])
    assert layer["gate_weight"] == pytest.approx([w * 8 / sum(weights) for w in weights], rel=1e-4)
    assert layer["max_violation"] == pytest.approx(max(chosen) * 8 / sum(chosen) - 1)
    halves = [sum(chosen[:4]), sum(chosen[4:])]
    assert layer["group_load"] == pytest.approx([2 * half / sum(halves) for half in halves])


@torch.no_grad()
def test_chosen_together_is_the_part_of_a_pairs_tokens_that_chose_both(folder: Path) -> None:
    model, _ = hf.load(folder / "model", device="cpu")
    ids = stream(folder, 64)
    usage = experts.measure(model, ids)
    rows = [set(row) for row in model.hidden(ids[None, :-1])[1][1].topk_ids.tolist()]
    either = sum(bool(row & {0, 3}) for row in rows)
    assert either > sum(row >= {0, 3} for row in rows) > 0
    assert usage.joint(1, 0, 3) == pytest.approx(sum(row >= {0, 3} for row in rows) / either)
    assert usage.joint(1, *NEVER) == 0


@torch.no_grad()
def test_a_prediction_module_is_measured_where_it_knows_its_token(folder: Path) -> None:
    model, _ = hf.load(folder / "model", device="cpu")
    ids = stream(folder, 50)
    usage = experts.measure(model, ids)
    hidden, _ = model.hidden(ids[None, :-1])
    _, choice = model.mtp_hidden(hidden, ids[None, 1:])
    assert usage.load[2].tolist() == torch.bincount(choice.topk_ids.flatten(), minlength=8).tolist()
    assert usage.load.sum(1).tolist() == [98, 98, 98]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_later_modules_and_parallel_heads_are_measured_on_what_they_read(folder: Path, kind: Any) -> None:
    small, _ = hf.load(folder / "model", device="cpu")
    config = dataclasses.replace(small.config, mtp_type=kind, num_nextn_predict_layers=2)
    model, ids = initialise(Transformer(config), std=0.2, seed=1), stream(folder, 30)
    usage = experts.measure(model, ids)
    trunk = model.trunk(ids[None, :-1])
    hidden, _ = model.top(trunk)
    first, _ = model.mtp_hidden(hidden if kind == "sequential" else trunk.x, ids[None, 1:])
    before = first if kind == "sequential" else trunk.x
    _, choice = model.mtp_hidden(before[:, :28], ids[None, 2:], depth=1)
    assert usage.load[3].tolist() == torch.bincount(choice.topk_ids.flatten(), minlength=8).tolist()


def test_without_text_the_report_compares_weights_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts.run(options(folder))
    text = capsys.readouterr().out
    assert text.count("0+3 1.00 1.00 1.00") == 3
    assert "--corpus" in text
    assert "MaxVio" not in text
    assert "load" not in report(options(folder), capsys)["layers"][0]


def test_the_report_counts_and_its_advice_can_be_followed_as_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts.run(with_text(folder))
    text = capsys.readouterr().out
    assert "6 of 24 experts idle" in text
    command = re.search(r"benthic experts prune (\S+) NEW --keep (\d+) --corpus (\S+)", text)
    assert command is not None
    model, keep, corpus = command.groups()
    output = tmp_path / "new"
    experts.run(
        options(folder, action="prune", model=Path(model), output=output, keep=int(keep), corpus=(Path(corpus),))
    )
    said = capsys.readouterr().out
    assert "6 of 8 experts in each of 3 layers" in said
    assert "had 0.00% to 0.00%" in said
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", said))
    assert before == after
    old, _ = hf.load(folder / "model", device="cpu")
    new, tokenizer = hf.load(output, device="cpu")
    ids = stream(folder, 60).unsqueeze(0)
    assert (new(ids) - old(ids)).abs().max() < 1e-5
    assert tokenizer is not None
    assert (output / "manifest.json").is_file()


def test_dropping_used_experts_is_said_with_its_price(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts.run(with_text(folder, action="prune", output=tmp_path / "new", keep=4))
    said = capsys.readouterr().out
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", said))
    assert before != after
    model, _ = hf.load(tmp_path / "new", device="cpu")
    assert experts.measure(model, stream(folder, 10**6)).bits == pytest.approx(after, abs=1e-4)


def test_merging_joins_the_twins_and_keeps_them_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, corpus in (("measured", (folder / "text.txt",)), ("plain", ())):
        experts.run(options(folder, action="merge", output=tmp_path / name, keep=6, corpus=corpus))
        said = capsys.readouterr().out
        assert ("bits per token" in said) == bool(corpus)
        assert ("per token and layer" in said) == bool(corpus)
        old, new = (hf.load(at, device="cpu")[0] for at in (folder / "model", tmp_path / name))
        assert new.config == dataclasses.replace(old.config, n_routed_experts=6)
        for before, after in zip(old.gates(), new.gates()):
            assert torch.equal(after.weight[0], before.weight[0])  # 0 with its twin 3
        first = "layers.1.mlp.routed_experts.down_proj"
        assert torch.equal(new.state_dict()[first][0], old.state_dict()[first][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "prune", "output": "new", "keep": 6}, "--corpus"),
        ({"action": "merge", "keep": 6}, "needs a folder to write"),
        ({"action": "merge", "output": "model", "keep": 6}, "already exists"),
        ({"action": "merge", "output": "new"}, "keep=0 -> use 1 to 7"),
        ({"action": "merge", "output": "new", "keep": 8}, "keep=8 -> use 1 to 7"),
        ({"action": "merge", "output": "new", "keep": 5}, "keep=5 cannot be routed: .*n_group=2"),
        ({"action": "merge", "output": "new", "keep": 2}, "keep=2 cannot be routed: .*at least two per group"),
        ({"action": "merge", "output": "new", "keep": 6, "json": True}, "--json belongs to report"),
        ({"output": "new"}, "report writes no model"),
        ({"keep": 6}, "report writes no model"),
        ({"model": "nowhere"}, "config.json is missing"),
        ({"corpus": ("nowhere.txt",)}, "nowhere.txt does not exist"),
        ({"corpus": ("blank.txt",)}, "no document.*1 skipped: 1 empty"),
        ({"corpus": ("text.txt",), "max_tokens": 2}, "give 3 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    (folder / "blank.txt").write_text(" \n")
    monkeypatch.setattr(hf, "load", lambda *a, **k: pytest.fail("weights were read"))
    paths = {key: folder / changes[key] for key in ("model", "output") if key in changes}
    corpus = {"corpus": tuple(folder / name for name in changes["corpus"])} if "corpus" in changes else {}
    with pytest.raises(InputError, match=message):
        experts.run(options(folder, **changes | paths | corpus))
    assert not (folder / "new").exists()


def test_dense_models_and_folders_without_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = hf.load(folder / "model", device="cpu")
    hf.write_model(tmp_path / "bare" / "model", model, None)
    with pytest.raises(InputError, match=r"no tokenizer.json, which --corpus needs"):
        experts.run(with_text(folder, model=tmp_path / "bare" / "model"))
    dense = dataclasses.replace(
        model.config, model_type="llama", n_routed_experts=0, first_k_dense_replace=3, num_nextn_predict_layers=0,
        q_lora_rank=None, kv_lora_rank=None, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    hf.write_model(tmp_path / "dense", initialise(Transformer(dense), 0.1, 0), None)
    with pytest.raises(InputError, match="is a dense model"):
        experts.run(options(tmp_path, model=tmp_path / "dense"))


def test_a_model_whose_loss_is_no_number_is_refused(folder: Path) -> None:
    model, _ = hf.load(folder / "model", device="cpu")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(CheckpointError, match="not a finite number"):
        experts.measure(model, stream(folder, 20))
