import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base import files
from benthic.base.errors import BenthicError, InputError
from benthic.data import shards
from benthic.data.shards import Shards

documents = st.lists(st.lists(st.integers(0, 69_999), max_size=20), min_size=1, max_size=12).filter(any)


@settings(max_examples=40, deadline=None)
@given(docs=documents, shard_tokens=st.integers(1, 30), data=st.data())
def test_what_is_written_is_read_back_across_shards(tmp_path_factory, docs, shard_tokens, data):
    folder = tmp_path_factory.mktemp("x") / "tokens"
    written = shards.write(folder, docs, 70_000, shard_tokens)
    flat = [i for doc in docs for i in doc]
    assert written.num_tokens == len(flat)
    assert [doc.tolist() for doc in written.documents()] == docs
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert written.read(start, stop).tolist() == flat[start:stop]


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_while_the_vocabulary_allows_it(tmp_path, vocab_size, width):
    written = shards.write(tmp_path / "t", [[0, vocab_size - 1]], vocab_size)
    assert (tmp_path / "t" / "shard-00000.bin").stat().st_size == 2 * width
    assert written.read(0, 2).tolist() == [0, vocab_size - 1]
    assert written.read(0, 2).dtype == np.int64


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path):
    shards.write(tmp_path / "t", [[1] * 6, [2] * 6, [3] * 6, []], 10, shard_tokens=10)
    sizes = [p.stat().st_size // 2 for p in sorted((tmp_path / "t").glob("shard-*"))]
    assert sizes == [12, 6]


@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_and_nothing_appears(tmp_path, bad):
    with pytest.raises(InputError, match=rf"id {bad} in document 1 .*vocab_size=10"):
        shards.write(tmp_path / "t", [[1], [2, bad]], 10)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("docs", [[], [[]], [[], []]])
def test_no_token_is_refused(tmp_path, docs):
    with pytest.raises(InputError, match="no token"):
        shards.write(tmp_path / "t", docs, 10)


def test_an_existing_folder_is_never_overwritten_and_leftovers_of_a_crash_are(tmp_path):
    with pytest.raises(InputError):
        shards.write(tmp_path / "t", [[1], [99]], 10)
    assert list(tmp_path.glob(f"{files.PARTIAL}*"))
    shards.write(tmp_path / "t", [[1]], 10)
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))
    with pytest.raises(InputError, match="exists"):
        shards.write(tmp_path / "t", [[1]], 10)


def test_the_identity_tells_data_apart(tmp_path):
    a, b, c = (shards.write(tmp_path / name, docs, 10) for name, docs in [("a", [[1]]), ("b", [[1]]), ("c", [[2]])])
    assert a.identity == b.identity != c.identity


def test_a_missing_folder_and_reads_outside_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Shards.open(tmp_path / "nothing")
    written = shards.write(tmp_path / "t", [[1, 2, 3]], 10)
    for start, stop in [(-1, 2), (2, 1), (0, 4)]:
        with pytest.raises(InputError, match="outside 0 to 3"):
            written.read(start, stop)


def test_bit_flips_truncations_and_missing_files_are_detected_by_name(tmp_path):
    rng = random.Random(0)
    shards.write(tmp_path / "t", [[rng.randrange(300) for _ in range(50)] for _ in range(8)], 300, shard_tokens=200)
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == ["documents.bin", "index.json", "manifest.json", "shard-00000.bin", "shard-00001.bin"]
    for name in names:
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        named = re.escape(str(tmp_path / "t")) if name == files.MANIFEST else rf"{name}|{files.MANIFEST}"
        for n in range(120):
            at = rng.randrange(len(whole))
            flip = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
            path.write_bytes(flip if n % 4 else whole[: rng.randrange(len(whole) - 1)])
            with pytest.raises(BenthicError, match=named):
                Shards.open(tmp_path / "t")
        path.unlink()
        with pytest.raises(BenthicError, match=name):
            Shards.open(tmp_path / "t")
        path.write_bytes(whole)
        Shards.open(tmp_path / "t")


def test_without_the_check_a_flip_would_be_read_as_data(tmp_path, monkeypatch):
    """The negative control of the test above."""
    shards.write(tmp_path / "t", [[1, 2, 3]], 10)
    (tmp_path / "t" / "shard-00000.bin").write_bytes(b"\1\0\2\0\7\0")
    monkeypatch.setattr(files, "verify_folder", lambda folder: None)
    assert Shards.open(tmp_path / "t").read(0, 3).tolist() == [1, 2, 7]
