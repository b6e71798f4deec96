"""Which processes share a model, and what is refused before they meet."""

import pytest
import torch

from benthic.base.errors import InputError
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import Alone, follows, launched, shared_by


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch):
    def start(rank: int, size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return start


def test_without_torchrun_a_process_is_alone(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launched().rank, launched().size) == (0, 1)
    assert shared_by(ParallelConfig()) == 1
    assert not follows(ParallelConfig())


def test_all_processes_that_torchrun_started_share_the_model_unless_told_otherwise(torchrun) -> None:
    torchrun(1, 4)
    assert shared_by(ParallelConfig()) == shared_by(ParallelConfig(tensor_parallel_size=4)) == 4
    assert follows(ParallelConfig())
    alone = ParallelConfig(tensor_parallel_size=1)
    assert shared_by(alone) == 1
    assert not follows(alone)
    torchrun(0, 4)
    assert not follows(ParallelConfig())


@pytest.mark.parametrize(("asked", "started"), [(2, 1), (2, 4), (8, 4)])
def test_another_number_of_processes_is_refused_with_the_command_that_starts_as_many(torchrun, asked, started) -> None:
    torchrun(0, started)
    with pytest.raises(InputError, match=f"torchrun --nproc-per-node {asked} "):
        shared_by(ParallelConfig(tensor_parallel_size=asked))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tensor_parallel_size": -1}, "tensor_parallel_size=-1"),
        ({"num_redundant_experts": 2}, "without expert parallelism"),
        ({"eplb_step_interval": 9}, "without expert parallelism"),
        ({"enable_expert_parallel": True, "num_redundant_experts": 1.5}, "num_redundant_experts=1.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong, message) -> None:
    with pytest.raises(InputError, match=message):
        ParallelConfig(**wrong)


def test_alone_everything_is_as_it_is() -> None:
    x, alone = torch.ones(2), Alone()
    assert alone.sum(x) is x
    assert alone.agree(x) is x
    assert alone.least(7) == 7
    assert alone.same("config") == "config"
