"""`benthic bench`: what it counts is what the engine did, and it counts only full steps of a warm engine."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benthic import cli
from benthic.base.errors import DoesNotFit, InputError
from benthic.inference.config import EngineConfig
from benthic.inference.engine import Engine
from benthic.jobs import bench
from benthic.model.config import ModelConfig
from benthic.model.hf import load, write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.recipes import tiny, v3
from benthic.tokenizer.tokenizer import Tokenizer

SHAPE = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, moe_intermediate_size=16,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=256,
    num_nextn_predict_layers=1,
)  # fmt: skip


def engine(**limits) -> Engine:
    model = bench.random_model(SHAPE, "cpu", torch.float32)
    config = {"max_num_seqs": 4, "max_model_len": 64, "page_size": 16, "enable_prefix_caching": False} | limits
    return Engine(model, None, EngineConfig(**config))


def test_the_workload_is_run_twice_and_leaves_the_engine_free():
    one = engine()
    bench.measured(one, batch=3, length=20, new=9)
    assert not one.busy
    assert one.stats.prefill_tokens == 2 * 3 * 20
    assert one.stats.generated_tokens == 2 * 3 * 9


def test_the_numbers_are_those_of_a_clock_that_ticks_once_per_look(monkeypatch):
    """Looks: start, all first tokens, start of decode, end. Eight steps bring three tokens each."""
    monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)
    found = bench.measured(engine(), batch=3, length=20, new=9)
    del found["peak_memory_gb"]
    assert found == {
        "prompt_tokens_per_s": 60, "ms_to_first_tokens": 1000, "decode_tokens_per_s": 24, "ms_per_step": 125,
        "tokens_per_step": 1,
    }  # fmt: skip


def test_steps_count_only_once_all_prompts_are_computed():
    """Prompts of 20 tokens through steps of at most 16: the first answers are under way while the last ones wait."""
    small = engine(max_num_batched_tokens=16)
    found = bench.measured(small, batch=3, length=20, new=40)
    assert found["tokens_per_step"] == 1
    assert small.stats.tokens_per_row == 1


def test_answers_that_end_before_all_have_begun_are_refused():
    with pytest.raises(InputError, match="output_len=2 at batch=3"):
        bench.measured(engine(max_num_batched_tokens=16), batch=3, length=20, new=2)


def test_right_drafts_show_as_tokens_per_step(monkeypatch):
    """A model of zeros always says token 0, and so do its drafts."""
    drafting = engine(num_speculative_tokens=1)
    assert 1 <= bench.measured(drafting, batch=2, length=20, new=20)["tokens_per_step"] < 2
    with torch.no_grad():
        drafting.model.embed_tokens.weight.zero_()
        drafting.model.head.zero_()
    found = bench.measured(drafting, batch=2, length=20, new=21)
    assert (found["tokens_per_step"], found["accepted_1"]) == (2, 1)


def test_short_answers_run_at_once_too():
    """Prompts and answers in one page: the scheduler wants a second one for each request to let all of them in."""
    assert bench.measured(engine(max_model_len=32, num_pages=8), batch=4, length=8, new=4)["tokens_per_step"] == 1
    with pytest.raises(DoesNotFit, match="needs 8 cache pages, there are 7"):
        bench.measured(engine(max_model_len=32, num_pages=7), batch=4, length=8, new=4)


def test_an_engine_that_would_find_the_repeated_prompts_is_refused():
    with pytest.raises(InputError, match="enable_prefix_caching=False"):
        bench.measured(engine(enable_prefix_caching=True), batch=1, length=8, new=2)


def test_a_batch_that_the_cache_does_not_hold_is_refused():
    with pytest.raises(DoesNotFit, match="needs 9 cache pages, there are 4"):
        bench.measured(engine(num_pages=4), batch=3, length=20, new=9)


def test_random_weights_have_the_spread_and_the_constants_of_a_new_model():
    model = bench.random_model(tiny.model(), "cpu", torch.float32, std=0.1)
    new = initialise(Transformer(tiny.model()), std=0.1, seed=0)
    for (name, parameter), expected in zip(model.named_parameters(), new.parameters(), strict=True):
        if parameter.dim() == 1:
            assert torch.equal(parameter, expected), name
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1), name
    for gate, expected in zip(model.gates(), new.gates(), strict=True):
        assert torch.equal(gate.e_score_correction_bias, expected.e_score_correction_bias)
    again = bench.random_model(tiny.model(), "cpu", torch.float32, std=0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_weights_beyond_the_memory_say_how_large_they_are(monkeypatch):
    def full(*args):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(bench.hf, "empty", full)
    with pytest.raises(DoesNotFit, match=r"1,3\d\d GB of weights"):
        bench.random_model(v3.v3(), "cpu", torch.bfloat16)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_table_holds_what_the_json_holds(phase, capsys):
    words = ["bench", phase, "tiny", "--device", "cpu", "--batch", "1", "2", "--input-len", "8", "--output-len", "4"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    assert ("decode_tokens_per_s" in found["rows"][0]) == (phase == "decode")
    assert all(value > 0 for row in found["rows"] for value in row.values())
    assert cli.main(words) == 0
    head, *lines = capsys.readouterr().out.partition("\n\n")[::2]
    assert "tiny: 2,664,960 parameters, float32, cpu" in head
    assert f"{found['cache_bytes_per_token']:,} bytes per token" in head
    assert all(bench.COLUMNS[name] in lines[0] for name in found["rows"][0])
    assert len(lines[0].splitlines()) == 3


def test_a_folder_is_measured_with_its_own_weights(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(bench, "random_model", lambda *args: pytest.fail("random weights"))
    words = ["bench", "decode", str(model_folder), "--device", "cpu", "--batch", "1", "--input-len", "8"]
    assert cli.main([*words, "--output-len", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["decode", "tony"], "did you mean 'tiny'"),
        (["decode", "tiny", "--batch", "0"], "--batch 0"),
        (["decode", "tiny", "--batch"], "--batch without a number"),
        (["decode", "tiny", "--output-len", "1"], "--output-len 1 -> use whole numbers from 2"),
        (["decode", "tiny", "--input-len", "512"], "max_position_embeddings=512 of tiny"),
        (["prefill", "tiny", "--input-len", "512"], "an answer of 1"),
        (["decode", "v1-7b", "--num-speculative-tokens", "1"], "num_speculative_tokens=1"),
        (["sampling", "tiny"], "'decode', 'prefill'"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_made(words, problem, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_model", lambda *args: pytest.fail("a model was made"))
    assert cli.main(["bench", *words]) == 2
    assert problem in capsys.readouterr().err


# ---- benchmarks/cache_loss.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_loss():
    """The script as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "cache_loss.py"
    spec = importlib.util.spec_from_file_location("cache_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wide(model_folder, tmp_path_factory):
    """A model folder whose latents are 64 wide."""
    tokenizer = Tokenizer.load(model_folder)
    shape = dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size, kv_lora_rank=64)
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_model(folder, bench.random_model(shape, "cpu", torch.float32, std=0.2), tokenizer)
    return folder


def test_the_loss_through_a_cache_as_computed_is_that_without_one(cache_loss, wide, monkeypatch):
    monkeypatch.setattr(cache_loss, "QUERIES", 7)
    model, _ = load(wide)
    tokens = torch.randint(0, 300, (5, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).double()
    labels = tokens[:, 1:].unsqueeze(2)
    expected = -logits.log_softmax(-1).gather(2, labels).squeeze(2).mean(1)
    torch.testing.assert_close(cache_loss.losses(model, tokens, "auto", rows=2), expected, rtol=1e-5, atol=1e-5)
    fp8, int6 = ((cache_loss.losses(model, tokens, f, rows=2) - expected).abs().mean() for f in ("fp8", "int6"))
    assert 1e-5 < fp8 < int6 < 0.5


def test_the_windows_cover_the_stream_once_and_thin_out_evenly(cache_loss, wide, tmp_path):
    (tmp_path / "a.txt").write_text("The sea is deep. " * 40)
    tokenizer = Tokenizer.load(wide)
    ids = [tokenizer.bos_id, *tokenizer.encode("The sea is deep. " * 40), tokenizer.eos_id]
    found = cache_loss.windows(tokenizer, [tmp_path / "a.txt"], 8, 10**6)
    assert found[:, 1:].flatten().tolist() == ids[1 : 1 + 8 * len(found)]
    assert len(found) == (len(ids) - 1) // 8
    three = found[[0, len(found) // 3, len(found) * 2 // 3]]
    assert torch.equal(cache_loss.windows(tokenizer, [tmp_path / "a.txt"], 8, 3), three)


def test_the_script_prints_and_writes_a_row_per_format(cache_loss, wide, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("The sea is deep. " * 40)
    words = ["--model", wide, "--text", tmp_path / "a.txt", "--length", "16", "--output", tmp_path / "rows.json"]
    monkeypatch.setattr(sys, "argv", ["cache_loss.py", "--device", "cpu", *map(str, words)])
    cache_loss.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["cache"] for row in rows] == ["auto", "fp8", "int6"]
    assert rows[0]["bytes per token"] > rows[1]["bytes per token"] > rows[2]["bytes per token"]
    assert rows[0]["change"] == rows[0]["interval"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("width", [None, 32, 96])
def test_latents_that_the_formats_do_not_pack_are_refused(cache_loss, width):
    with pytest.raises(InputError, match=f"kv_lora_rank={width}"):
        cache_loss.check(dataclasses.replace(tiny.model(), kv_lora_rank=width), 256)
    cache_loss.check(dataclasses.replace(tiny.model(), kv_lora_rank=128), 256)


def test_presets_are_measured_with_fp8_weights(monkeypatch, capsys):
    monkeypatch.setitem(bench.MODELS, "small", lambda: SHAPE)
    monkeypatch.setattr(bench, "find", lambda name: SHAPE)
    options = ["--batch", "1", "--input-len", "8", "--output-len", "4", "--device", "cpu", "--quantization", "fp8"]
    assert cli.main(["bench", "decode", "small", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "fp8"
    assert cli.main(["bench", "decode", "small", *options]) == 0
    assert "float32, FP8 weights, cpu" in capsys.readouterr().out
