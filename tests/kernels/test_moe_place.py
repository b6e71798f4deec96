"""Experts that live on several devices: who computes which pair, and what nobody here computes is not read."""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.moe import ExpertWeights, Rows, Sorted, Tiles, moe
from benthic.kernels.moe_place import place, place_ref

N, K, E, D, I = 9, 3, 6, 32, 16
WAYS = [Rows(up_tile=8192, down_tile=8192), Tiles(up_n=16, up_k=32, down_k=32), Sorted()]


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 2), (5, 3, 8), (200, 2, 64)])
def test_ids_become_slots_and_loads_as_in_plain_torch(n, k, e, device) -> None:
    torch.manual_seed(n)
    ids = torch.randint(0, e, (n, k), dtype=torch.int32, device=device)
    tokens, positions, slots = (torch.randint(0, high, (n,), device=device) for high in (60, 900, 3))
    copies = torch.randint(-1, 5, (e, 3), dtype=torch.int32, device=device)
    count = torch.randint(1, 4, (e,), dtype=torch.int32, device=device)
    loads = torch.full((2, e), 7, device=device)
    found = place(ids, tokens, positions, slots, copies, count, loads[0])
    assert torch.equal(found, place_ref(ids, tokens, positions, slots, copies, count, loads[1]))
    assert torch.equal(loads[0], loads[1])
    assert loads[0].sum() - 7 * e == k * (slots != 0).sum()
    assert (found[slots == 0] == -1).all()


def test_copies_get_about_the_same_number_of_tokens(device) -> None:
    n = 3000
    ids = torch.zeros(n, 1, dtype=torch.int32, device=device)
    tokens, positions = torch.randint(0, 10_000, (n,), device=device), torch.arange(n, device=device) % 1000
    copies, count = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[2, 0, 1]], [3]))
    load = torch.zeros(1, dtype=torch.int64, device=device)
    found = place(ids, tokens, positions, torch.ones_like(tokens), copies, count, load)
    assert found.flatten().bincount(minlength=3).min() > n / 4


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN."""
    true = torch.empty

    def empty(*args, **kwargs) -> Tensor:
        found = true(*args, **kwargs)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", empty)


def weights(device: str, shared: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(device)

    own = {"shared_gate_proj": random(I, D), "shared_up_proj": random(I, D), "shared_down_proj": random(D, I)}
    return ExpertWeights(gate_up_proj=random(E, 2 * I, D), down_proj=random(E, D, I), **own if shared else {})


@pytest.mark.parametrize("tiles", WAYS, ids=["rows", "tiles", "sorted"])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_parts_of_two_devices_add_up_to_the_whole(tiles, shared, device, poisoned) -> None:
    torch.manual_seed(1)
    whole, x = weights(device, shared), torch.randn(N, D, device=device)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(N)]).int().to(device)
    ids[0] = torch.tensor([0, 1, 2])  # all of them on the first device
    gates = torch.rand(N, K, device=device)
    names = ("gate_up_proj", "down_proj")
    first, second = (
        {name: getattr(whole, name)[part].contiguous() for name in names} for part in (slice(0, 4), slice(4, E))
    )
    here = moe(x, dataclasses.replace(whole, **first), torch.where(ids < 4, ids, -1), gates, tiles=tiles, of=E)
    there = moe(x, ExpertWeights(**second), torch.where(ids < 4, -1, ids - 4), gates, tiles=tiles, of=E)
    torch.testing.assert_close(here + there, moe(x, whole, ids, gates, tiles=tiles), rtol=1e-4, atol=1e-5)
    assert (there[0] == 0).all()


@pytest.mark.parametrize("tiles", WAYS, ids=["rows", "tiles", "sorted"])
def test_a_device_that_no_pair_belongs_to_adds_exactly_nothing(tiles, device, poisoned) -> None:
    ids = torch.full((N, K), -1, dtype=torch.int32, device=device)
    out = moe(
        torch.ones(N, D, device=device), weights(device, 0), ids, torch.ones(N, K, device=device), tiles=tiles, of=99
    )
    assert (out == 0).all()
