import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benthic.base.errors import BenthicError, CheckpointError
from benthic.base.files import sha256_file
from benthic.base.tensors import Spec, TensorFile, write_stream, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def example(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 3).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (3, 4), (2, 3, 5)], ids=str)
def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = example(dtype, *shape)
    write_tensors(tmp_path / "ours", {"x": tensor})
    save_file({"x": tensor}, tmp_path / "theirs")
    assert same(load_file(tmp_path / "ours")["x"], tensor)
    assert same(TensorFile(tmp_path / "theirs")["x"], tensor)
    assert same(TensorFile(tmp_path / "ours")["x"], tensor)
    assert TensorFile(tmp_path / "ours").shape("x") == shape


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_any_mixture_of_dtypes_and_shapes_in_one_file_reads_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("mixture") / "x.safetensors"
    tensors = {f"t{i}": example(dtype, *shape) for i, (dtype, shape) in enumerate(specs)}
    write_tensors(path, tensors)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


def test_the_file_is_the_same_whatever_the_order_of_the_mapping(tmp_path: Path) -> None:
    a, b = example(torch.float32, 3), example(torch.bfloat16, 2)
    assert write_tensors(tmp_path / "ab", {"a": a, "b": b}) == write_tensors(tmp_path / "ba", {"b": b, "a": a})
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "ba").read_bytes()


def test_the_returned_digest_is_that_of_the_file(tmp_path: Path) -> None:
    digest = write_tensors(tmp_path / "x", {"a": example(torch.float32, 9)})
    assert digest == sha256_file(tmp_path / "x")


def test_views_and_transposes_are_written_as_they_look_not_as_they_lie(tmp_path: Path) -> None:
    base = example(torch.float32, 4, 6)
    views = {"transposed": base.T, "strided": base[:, ::2], "expanded": base[:1].expand(3, 6), "negated": -base}
    write_tensors(tmp_path / "x", views)
    read = load_file(tmp_path / "x")
    assert all(same(read[name], view.contiguous()) for name, view in views.items())


def test_a_parameter_that_needs_a_gradient_is_written(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(example(torch.float32, 3))
    write_tensors(tmp_path / "x", {"w": weight})
    assert same(load_file(tmp_path / "x")["w"], weight.detach())


def test_the_file_says_that_torch_wrote_it_because_transformers_asks(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": example(torch.float32, 2)})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    bad = example(dtype, 3, 3)
    bad[1, 2] = value
    with pytest.raises(CheckpointError, match=r"tensor model\.bad is not finite"):
        write_tensors(tmp_path / "x", {"model.a": example(dtype, 2), "model.bad": bad})
    assert not (tmp_path / "x").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        TensorFile(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_file_cut_short_anywhere_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"a": example(torch.float32, 64), "b": example(torch.float32, 64)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a whole safetensors file"):
        TensorFile(path)


A, B = ({"dtype": "F32", "shape": [2], "data_offsets": at} for at in ([0, 8], [8, 16]))
HEADERS = {
    "a hole": {"a": A, "b": B | {"data_offsets": [12, 20]}},
    "an overlap": {"a": A, "b": B | {"data_offsets": [4, 12]}},
    "bytes that nobody owns": {"a": A},
    "data beyond the end": {"a": A, "b": B, "c": B | {"data_offsets": [16, 24]}},
    "a shape of another size": {"a": A | {"shape": [3]}, "b": B},
    "a negative shape": {"a": A | {"shape": [-1, -2]}, "b": B},
    "a shape of words": {"a": A | {"shape": "2"}, "b": B},
    "an unknown dtype": {"a": A | {"dtype": "F4"}, "b": B},
    "negative places": {"a": A | {"data_offsets": [-8, 0]}, "b": B},
    "missing keys": {"a": {"dtype": "F32"}, "b": B},
    "a list": [A, B],
    "no table": {"a": 3, "b": B},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_does_not_describe_the_file_to_its_last_byte_is_refused(tmp_path: Path, header: object) -> None:
    path = tmp_path / "x.safetensors"

    def write(value: object) -> None:
        head = json.dumps(value).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))

    write(header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a whole safetensors file"):
        TensorFile(path)
    write({"__metadata__": {"format": "pt"}, "b": B, "a": A})  # the control: the same file with a true header
    assert TensorFile(path).names == ["a", "b"]


def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of 4611686018427387904 bytes in a file of 10"):
        TensorFile(path)


def test_a_file_that_shrinks_after_it_was_opened_is_named_with_the_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": example(torch.float32, 64)})
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="x ends inside of a"):
        file["a"]


def test_a_stream_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    specs = {"a": Spec(torch.float32, (3,)), "b": Spec(torch.bfloat16, (2,))}
    a, b = example(torch.float32, 3), example(torch.bfloat16, 2)
    write_stream(tmp_path / "x", specs, [("a", a), ("b", b)])
    assert same(TensorFile(tmp_path / "x")["b"], b)
    for wrong in ([("b", b), ("a", a)], [("a", a)], [("a", a), ("b", b.float())], [("a", a), ("b", b), ("c", b)]):
        with pytest.raises(ValueError, match=r"announced|shorter|longer"):
            write_stream(tmp_path / "x", specs, wrong)


def test_a_folder_that_does_not_exist_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(BenthicError, match=r"cannot write .*nowhere"):
        write_tensors(tmp_path / "nowhere" / "x", {"a": example(torch.float32, 1)})


def test_tensors_are_written_one_by_one_without_a_second_copy_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benthic.base import files

    sizes = []
    write = files.os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    write_tensors(tmp_path / "x", {f"t{i}": torch.ones(1000) for i in range(5)})
    assert max(sizes) == 4000
    assert sizes.count(4000) == 5
