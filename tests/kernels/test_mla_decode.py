"""The decode kernel against plain torch: formats, ragged contexts, drafts, splits, and memory that must not be read."""

import pytest
import torch
from torch import Tensor

from benthic.kernels.latent import Latents, empty_latents

mla_decode = pytest.importorskip("benthic.kernels.mla_decode", reason="needs triton")
mla_stretch = pytest.importorskip("benthic.kernels.mla_stretch", reason="needs triton")

PAGE, P = 16, 16
NAN = float("nan")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch) -> None:
    """Memory that nobody wrote is NaN: outputs, and what splits leave for the combining kernel."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(NAN))


def tiles(splits: int = 1, swap: bool = False, parts: int = 1):
    return mla_decode.Tiles(
        block_m=16, block_n=16, splits=splits, swap=swap, parts=parts, num_warps=4, num_stages=2
    )  # fmt: skip


def problem(
    format: str, context: list[int], queries: int, heads: int, device: str, width: int = 64, page: int = PAGE,
    dtype: torch.dtype | None = None, sizes: tuple[float, ...] = (1.0,),
) -> dict[str, object]:  # fmt: skip
    """Rows with pages in random order; every slot that no row owns is NaN, as are the table's entries past a row.

    Latents of a row's tokens are as large as `sizes`, in turn.
    """
    generator = torch.Generator().manual_seed(sum(context) + queries + heads)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    needed = [-(-c // page) for c in context]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=generator).to(torch.int32).split([*needed, 3])
    table = torch.full((len(context), max([*needed, 1]) + 1), 10**6, dtype=torch.int32)
    latents = empty_latents(format, total * page, width, P, dtype, "cpu")
    latents.k_rope.fill_(NAN)
    (latents.c_kv if latents.scales is None else latents.scales).fill_(NAN)
    for row, (length, pages) in enumerate(zip(context, order)):
        table[row, : len(pages)] = pages
        position = torch.arange(length)
        slots = pages[position // page].long() * page + position % page
        size = torch.tensor(sizes)[position % len(sizes), None]
        latents.write(slots, (normal(length, width) * size).to(dtype), normal(length, P).to(dtype))
    n = len(context) * queries
    on = {
        "c_kv": latents.c_kv.to(device), "k_rope": latents.k_rope.to(device),
        "scales": None if latents.scales is None else latents.scales.to(device),
    }  # fmt: skip
    return {
        "q_latent": normal(n, heads, width).to(device, dtype).transpose(0, 1),  # strides of a batched product
        "q_rope": normal(n, heads, P).to(device, dtype), "latents": Latents(format=format, **on),
        "table": table.to(device), "context": torch.tensor(context, dtype=torch.int32, device=device),
        "page_size": page, "scale": 0.2,
    }  # fmt: skip


def close(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all()
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[got.dtype]
    assert (got.float() - expected.float()).norm() <= limit * expected.float().norm()


@pytest.mark.parametrize("format", ["auto", "fp8", "int6"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("context", "queries", "heads"),
    [([1], 1, 16), ([33, 16, 2], 1, 5), ([17, 40, 5, 0], 2, 16), ([70], 4, 3), ([3, 35], 3, 2)],
)
def test_the_kernel_equals_plain_attention_and_reads_nothing_past_a_context(
    format, splits, context, queries, heads, device
) -> None:
    given = problem(format, context, queries, heads, device)
    got = mla_decode.mla_decode(**given, tiles=tiles(splits, swap=splits == 1))
    close(got, mla_decode.mla_decode_ref(**given))


@pytest.mark.parametrize("format", ["auto", "fp8", "int6"])
def test_wide_rows_and_tiles_that_share_a_page(format, device) -> None:
    """256 wide: two scales per row in fp8, four in int6; pages of 32 in tiles of 16."""
    given = problem(format, [50, 33], 1, 16, device, width=256, page=32)
    expected = mla_decode.mla_decode_ref(**given)
    for swap, parts in [(False, 1), (True, 2), (False, 4)]:
        close(mla_decode.mla_decode(**given, tiles=tiles(2, swap, parts)), expected)


@pytest.mark.parametrize("format", ["fp8", "int6"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("sizes", [(0.0,), (0.01,), (1000.0,), (0.0, 1.0, 1e-3, 3.0), (1e-4, 0.0, 3.0)])
def test_numbers_of_half_precision_hold_rows_of_any_size_and_outliers_in_queries(format, swap, sizes, device) -> None:
    """The restored tile and the weights are float16: neither may overflow, nor lose the small beside the large."""
    given = problem(format, [37, 20], 2, 5, device, width=128, dtype=torch.float16, sizes=sizes)
    given["q_latent"][:, 1] *= 1e-3
    given["q_latent"][0, 0, 3] = 60000.0
    given["q_latent"][2, 3] = 0.0
    for splits in (1, 2):
        got = mla_decode.mla_decode(**given, tiles=tiles(splits, swap))
        expected = mla_decode.mla_decode_ref(**given)
        assert got.isfinite().all()
        for head in range(5):  # each head alone: an outlier's answer must not hide another's
            close(got[head], expected[head])


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_of_padding_give_zeros_whatever_their_table_says(splits, device) -> None:
    given = problem("auto", [0, 20, 0], 2, 16, device)
    got = mla_decode.mla_decode(**given, tiles=tiles(splits))
    assert not got[:, [0, 1, 4, 5]].any()
    assert got[:, 2:4].any()


def test_a_draft_sees_the_drafts_before_it_and_not_those_after(device) -> None:
    """Each query alone, with the context cut after it, gives the same."""
    given = problem("auto", [37, 20], 3, 4, device)
    together = mla_decode.mla_decode(**given, tiles=tiles(2))
    for j in range(3):
        alone = given | {
            "q_latent": given["q_latent"][:, j::3], "q_rope": given["q_rope"][j::3].contiguous(),
            "context": given["context"] - 2 + j,
        }  # fmt: skip
        close(together[:, j::3], mla_decode.mla_decode(**alone, tiles=tiles()))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    ("context", "queries", "heads"), [([1, 16, 0, 33], 1, 4), ([18, 3, 32, 64], 3, 5), ([17], 2, 16)]
)
def test_a_program_for_every_tile_gives_the_same_answer(context, queries, heads, parts, device) -> None:
    """New tokens at the end of a tile, across two of them, alone in one; a row of padding."""
    given = problem("auto", context, queries, heads, device)
    stretches, lse = mla_stretch.stretches(**given, parts=parts)
    assert lse.isneginf().any()  # contexts of several lengths leave stretches without a token
    out = mla_decode.combine(stretches, lse, given["q_rope"].dtype)
    close(out, mla_decode.mla_decode_ref(**given))


def test_a_program_for_every_tile_is_for_few_rows_of_the_plain_format(device) -> None:
    latents = problem("auto", [5], 1, 4, device)["latents"]
    assert mla_stretch.fits(latents, 4, 16, 64, 2048)
    assert not mla_stretch.fits(latents, 8, 16, 64, 2048)
    assert not mla_stretch.fits(problem("fp8", [5], 1, 4, device)["latents"], 1, 16, 64, 64)


def test_rounding_the_cache_is_felt(device) -> None:
    """Negative control: the formats give different answers, so the comparisons above see the codes."""
    answers = [mla_decode.mla_decode(**problem(f, [40], 1, 4, device), tiles=tiles()) for f in ("auto", "fp8", "int6")]
    for quantised in answers[1:]:
        difference = ((quantised - answers[0]).norm() / answers[0].norm()).item()
        assert 1e-3 < difference < 0.2


def test_tiles_are_chosen_from_shapes_and_give_the_same_answer(device) -> None:
    given = problem("auto", [40, 3], 2, 16, device)
    chosen = mla_decode.choose_tiles(given["latents"], 2, 32, PAGE, 64)
    assert chosen.splits > 1
    close(mla_decode.mla_decode(**given), mla_decode.mla_decode_ref(**given))


def test_many_rows_are_not_split_and_few_are_but_not_into_less_than_a_tile() -> None:
    latents = empty_latents("auto", 64, 64, P, torch.float32, "cpu")
    assert mla_decode.choose_tiles(latents, 256, 16, 64, 4096).splits == 1
    assert mla_decode.choose_tiles(latents, 8, 16, 64, 4096).splits == 17
    assert mla_decode.choose_tiles(latents, 32, 16, 64, 512).splits == 4  # two tiles each
    assert mla_decode.choose_tiles(latents, 1, 16, 64, 1024).splits == 16


def test_codes_of_many_tiles_are_loaded_two_tiles_ahead() -> None:
    for format in ("fp8", "int6"):
        latents = empty_latents(format, 64, 64, P, torch.bfloat16, "cpu")
        assert mla_decode.choose_tiles(latents, 128, 16, 64, 1088).num_stages == 3
        assert mla_decode.choose_tiles(latents, 1, 16, 64, 1088).num_stages == 2  # two tiles in all


def test_no_row_is_no_launch(device) -> None:
    given = problem("auto", [5], 1, 2, device)
    none = {"q_latent": given["q_latent"][:, :0], "q_rope": given["q_rope"][:0], "table": given["table"][:0]}
    assert mla_decode.mla_decode(**given | none | {"context": given["context"][:0]}).shape == (2, 0, 64)


def test_wrong_shapes_dtypes_and_pages_are_refused(device) -> None:
    given = problem("auto", [5, 7], 1, 2, device)
    with pytest.raises(ValueError, match=r"must be \[H, N, R\] and \[N, H, P\]"):
        mla_decode.mla_decode(**given | {"q_rope": given["q_rope"][:1]})
    with pytest.raises(ValueError, match="use int32"):
        mla_decode.mla_decode(**given | {"table": given["table"].long()})
    with pytest.raises(ValueError, match="page_size=24"):
        mla_decode.mla_decode(**given | {"page_size": 24})
    with pytest.raises(ValueError, match="as many queries in every row"):
        mla_decode.mla_decode(**given | {"table": given["table"][:1]})
