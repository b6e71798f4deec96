"""Memory while a checkpoint is read or rewritten, measured from outside: the peak of a process of its own.

The controls do the same work as tools commonly do it, all files mapped or read at once, and must break the same bound.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.base.log import megabytes
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.model.weights import Weights

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
MB = 1_000_000
SHARDS = 10
LOSSY = ("bfloat16", "fp8")
SLACK = 16 * MB  # of the allocator and of code that is paged in
CONFIG = ModelConfig(
    vocab_size=8000, hidden_size=512, num_hidden_layers=4, num_nextn_predict_layers=0, intermediate_size=2048,
    moe_intermediate_size=384, n_routed_experts=16, num_attention_heads=8,
)  # fmt: skip
SMALL = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64)

PROBE = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from benthic.jobs import convert
from benthic.jobs.config import ConvertConfig
from benthic.model import fp8, hf, weights

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def work(what, folder, output, dtype):
    if what == "load":
        hf.load(folder, device="cpu")
    elif what == "load as FP8":
        hf.load(folder, device="cpu", quantization="fp8")
    elif what == "load, then quantise":
        fp8.to_fp8(hf.load(folder, device="cpu")[0])
    elif what == "map all shards and copy":
        model = hf.empty(hf.read_config(folder), "cpu", torch.float32)
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        held = {name: file.get_tensor(name) for file in files for name in file.keys()}
        with torch.no_grad():
            for name, view in hf.checkpoint_views(model):
                view.copy_(held[name])
    elif what == "convert":
        convert.run(ConvertConfig(model=folder, output=output, dtype=dtype, max_shard_size="13MB"))
    elif what == "load, then write":
        hf.write_model(output, hf.load(folder, device="cpu")[0], None, shard_bytes=13_000_000)

torch.set_num_threads(1)
big, small, output = map(Path, sys.argv[1:4])
dtype, *works = sys.argv[4:]
for what in works:  # code that is loaded on first use is not the work's memory
    work(what, small, output / f"small {what}", dtype)
before, peaks = memory("VmRSS"), []
assert memory("VmHWM") - before < 20e6, "an earlier peak would hide that of the work"
for what in works:
    work(what, big, output / what, dtype)
    peaks.append(memory("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder of 100 to 200 MB in about ten shards, and the bytes of its tensors."""
    folder = tmp_path_factory.mktemp("big") / "m"
    model = initialise(Transformer(CONFIG), std=0.02, seed=0)
    size = sum(t.nbytes for t in model.state_dict().values())
    assert 100 * MB < size < 200 * MB
    hf.write_model(folder, model, None, shard_bytes=size // SHARDS + MB)
    hf.write_model(folder.parent / "small", initialise(Transformer(SMALL), std=0.02, seed=0), None)
    assert SHARDS <= len(list(folder.glob("*.safetensors"))) <= SHARDS + 2
    return folder, size


def peaks(big: Path, output: Path, *works: str, dtype: str = "auto") -> list[int]:
    """Bytes by which a process's memory has risen after each of the works."""
    command = [sys.executable, "-c", PROBE, str(big), str(big.parent / "small"), str(output), dtype, *works]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_needs_the_model_and_at_most_one_shard(big: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = big
    bound = size + size // SHARDS + SLACK
    loading, control = peaks(folder, tmp_path, "load", "map all shards and copy")
    assert 0.9 * size < loading < bound < control


def test_weights_become_fp8_while_they_are_loaded(big: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = big
    loading, control = peaks(folder, tmp_path, "load as FP8", "load, then quantise")
    assert loading < 0.5 * size + SLACK < size < control


@pytest.mark.parametrize("dtype", ["auto", *(pytest.param(dtype, marks=pytest.mark.long) for dtype in LOSSY)])
def test_converting_never_holds_the_model(big: tuple[Path, int], tmp_path: Path, dtype: str) -> None:
    folder, size = big
    converting, control = peaks(folder, tmp_path, "convert", "load, then write", dtype=dtype)
    assert converting < 4 * size // SHARDS + SLACK < control, (converting, control)


def test_files_are_open_only_while_a_tensor_is_read(big: tuple[Path, int]) -> None:
    folder, _ = big
    weights = Weights(folder)
    total = sum(weights[name].sum().item() for name in weights.names[:20])
    assert total != 0
    open_files = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not [path for path in open_files if path.parent == folder.resolve()]


def test_the_weight_and_the_factors_of_fp8_blocks_may_lie_in_different_shards(
    tmp_path: Path, model: Transformer
) -> None:
    hf.write_model(tmp_path / "m", model, None, fp8=True)
    tensors = load_file(tmp_path / "m" / hf.WEIGHTS)
    parts = {
        "a.safetensors": {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")},
        "b.safetensors": {n: t for n, t in tensors.items() if n.endswith("_scale_inv")},
    }
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "config.json").write_bytes((tmp_path / "m" / "config.json").read_bytes())
    for file, part in parts.items():
        save_file(part, tmp_path / "split" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, split = (hf.load(tmp_path / name, device="cpu")[0].state_dict() for name in ("m", "split"))
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_progress_is_shown_from_200_megabytes_on_and_only_where_info_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lines(total: int, level: str) -> list[str]:
        caplog.clear()
        caplog.set_level(level, "benthic")
        with megabytes("read m", total) as add:
            for _ in range(10):
                add(total // 10)
        return [record.getMessage() for record in caplog.records]

    assert lines(1000 * MB, "INFO") == ["read m, MB 1,000/1,000"]
    assert lines(100 * MB, "INFO") == []
    assert lines(1000 * MB, "WARNING") == []
