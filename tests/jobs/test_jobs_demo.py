"""The whole job on a model of a few thousand weights: stages, continuation, refusals."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benthic.base.errors import BenthicError, CheckpointError, InputError, Interrupted
from benthic.base.files import sha256_file, verify_folder
from benthic.base.log import Run
from benthic.base.signals import Stop
from benthic.data import shards
from benthic.inference.config import SamplingParams
from benthic.inference.llm import LLM
from benthic.jobs import demo
from benthic.model.config import ModelConfig
from benthic.recipes import tiny
from benthic.recipes.demo import DemoConfig

WORDS = "the sea is deep and the light is far while small things move in the dark and wait for rain".split()
VARYING = {"time", "tokens_per_s", "wall_seconds", "peak_memory_gb", "output_dir"}


def texts(folder: Path) -> Path:
    """Sixty different documents."""
    folder.mkdir(parents=True)
    for i in range(60):
        pick = random.Random(i)
        lines = [" ".join(pick.choice(WORDS) + str(pick.randrange(40)) for _ in range(12)) for _ in range(20)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def micro(corpus: Path, output_dir: Path) -> DemoConfig:
    """Every stage with a handful of steps; checkpoints at awkward places."""
    config = tiny.demo(smoke=True)
    model = ModelConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=24, moe_intermediate_size=8,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, max_position_embeddings=128,
    )  # fmt: skip
    small: dict[str, Any] = {"per_device_train_batch_size": 2, "max_length": 64}
    return dataclasses.replace(
        config,
        model=model,
        corpus=dataclasses.replace(config.corpus, paths=(corpus,), held_out_share=0.2),
        pretrain=dataclasses.replace(config.pretrain, **small, max_steps=7, eval_steps=3, save_steps=3),
        balance_off_steps=3,
        sft=dataclasses.replace(config.sft, **small, max_steps=4, save_steps=3),
        shortcut=dataclasses.replace(config.shortcut, **small, max_steps=2),
        rl=dataclasses.replace(config.rl, **small, max_steps=6, save_steps=4),
        grpo=dataclasses.replace(config.grpo, prompts_per_generation=4, num_generations=3, max_completion_length=6),
        evaluation=dataclasses.replace(config.evaluation, problems=3, samples=8, speculative_prompts=2),
        output_dir=output_dir,
    )


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves and that must not depend on when it was interrupted."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in VARYING}
        return [clean(v) for v in value] if isinstance(value, list) else value

    rows = [clean(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))},
        "shards": {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.bin"))},
        "rows": sorted(rows, key=lambda row: (row["stage"], row["step"], len(row))),
        "results": clean(json.loads((folder / "results.json").read_text())),
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    demo.run(micro(corpus, folder), Stop())
    return folder


def test_a_finished_run_leaves_a_report_and_a_model_that_answers(finished: Path) -> None:
    verify_folder(finished / "model")
    results = json.loads((finished / "results.json").read_text())
    assert results["speculative"]["identical"]
    assert results["absorbed_error"] < 1e-4
    assert results["corpus"]["train_documents"] + results["corpus"]["heldout_documents"] <= 60
    assert "<svg" in (finished / "report.html").read_text()
    output = LLM(finished / "model", device="cpu").generate("1+2=", SamplingParams(max_tokens=3, temperature=0))[0]
    assert len(output.token_ids) <= 3


class Impatient(Stop):
    """Asks to stop at the n-th time somebody looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        super().__init__()

    @property
    def requested(self) -> int | None:
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None

    @requested.setter
    def requested(self, value: int | None) -> None:
        pass


def test_a_run_stopped_again_and_again_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, finished: Path
) -> None:
    config, codes = micro(corpus, tmp_path / "run"), []
    torch.manual_seed(99)  # another process has drawn other numbers before
    while len(codes) < 100 and not (tmp_path / "run" / "report.html").exists():
        try:
            demo.run(config, Impatient(looks=4))
        except Interrupted as stop:
            codes.append(stop.exit_code)
    assert set(codes) == {143}
    assert len(codes) > 3
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


@pytest.mark.parametrize("calls", [3, 12, 19])
def test_a_run_that_crashed_in_a_stage_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    config, log, left = micro(corpus, tmp_path / "run"), Run.log, [calls]

    def crash(self: Run, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("the machine went away")
        log(self, *arguments)

    monkeypatch.setattr(Run, "log", crash)
    with pytest.raises(RuntimeError, match="the machine went away"):
        demo.run(config, Stop())
    demo.run(config, Stop())
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_jobs_demo import micro
from benthic.base.signals import Stop
from benthic.jobs import demo
demo.run(micro(Path(sys.argv[2]), Path(sys.argv[3])), Stop())
"""


@pytest.mark.long
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, finished: Path
) -> None:
    moments, kills = random.Random(0), 0
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(corpus), str(tmp_path / "run")]
    while kills < 40:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            assert child.wait(timeout=2 + 2 * moments.random() + kills / 4) == 0
            break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
    assert kills >= 2
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


@pytest.mark.parametrize("written", [1, 2])
def test_a_run_that_crashed_between_shards_and_result_starts_the_corpus_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    config, write, done = micro(corpus, tmp_path / "run"), shards.write, []

    def crash(*arguments: Any) -> shards.Shards:
        done.append(write(*arguments))
        if len(done) == written:
            raise RuntimeError("the machine went away")
        return done[-1]

    monkeypatch.setattr(shards, "write", crash)
    with pytest.raises(RuntimeError, match="the machine went away"):
        demo.run(config, Stop())
    with pytest.raises(Interrupted, match="before stage pretrain"):
        demo.run(config, Impatient(looks=1))
    shards.Shards.open(tmp_path / "run" / "corpus" / "heldout")


def test_another_seed_leaves_another_fingerprint(corpus: Path, tmp_path: Path, finished: Path) -> None:
    demo.run(dataclasses.replace(micro(corpus, tmp_path / "run"), seed=1), Stop())
    assert fingerprint(tmp_path / "run")["weights"] != fingerprint(finished)["weights"]


def test_a_folder_begun_with_other_numbers_is_refused_by_the_first_key(corpus: Path, finished: Path) -> None:
    config = micro(corpus, finished)
    other = dataclasses.replace(config, sft=dataclasses.replace(config.sft, learning_rate=0.5))
    with pytest.raises(InputError, match=r"begun with sft\.learning_rate=.*, now it is 0\.5"):
        demo.run(other, Stop())


def test_a_stage_whose_last_checkpoint_is_damaged_is_not_continued_from_an_earlier_one(
    corpus: Path, tmp_path: Path, finished: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "sft")
    weights = copy / "pretrain" / "checkpoints" / "step-00000007" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"'pretrain' .* ended at step 7, but only step 6 is whole"):
        demo.run(micro(corpus, copy), Stop())


def test_several_processes_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE=2 -> this job runs in one process"):
        demo.run(micro(corpus, tmp_path / "run"), Stop())


def test_an_empty_corpus_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing"):
        demo.run(micro(tmp_path / "nothing", tmp_path / "run"), Stop())


def test_a_damaged_shard_is_named(corpus: Path, tmp_path: Path) -> None:
    config = micro(corpus, tmp_path / "run")
    with pytest.raises(Interrupted):
        demo.run(config, Impatient(looks=1))
    (shard,) = [p for p in (tmp_path / "run" / "corpus" / "train").iterdir() if p.name.startswith("shard")][:1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BenthicError, match=shard.name):
        demo.run(config, Stop())
