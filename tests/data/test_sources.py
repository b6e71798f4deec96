import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from benthic.base.errors import InputError
from benthic.data import sources
from benthic.data.documents import LISTED, Skips
from benthic.data.sources import read, standard_library


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_folder_gives_every_text_once_in_sorted_order_with_ids_that_do_not_hold_the_machine(tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("b/two.md", "a.txt", "b/one.py", "no_suffix"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(f"text of {name}")
    (corpus / ".hidden").write_text("secret")
    documents = list(read([corpus], Skips()))
    assert [d.id for d in documents] == ["corpus/a.txt", "corpus/no_suffix", "corpus/b/one.py", "corpus/b/two.md"]
    assert {d.source for d in documents} == {"corpus"}
    assert documents[0].text == "text of a.txt"


def test_json_lines_parquet_and_packed_files_are_read_with_line_numbers(tmp_path):
    (tmp_path / "plain.jsonl").write_bytes(lines({"text": "one"}) + b"\n" + lines({"text": "二", "more": 1}))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines({"text": "three"}, {"text": "four"})))
    with pyarrow.output_stream(str(tmp_path / "note.txt.zst"), compression="zstd") as file:
        file.write("five 五".encode())
    parquet.write_table(pyarrow.table({"text": ["six", None, "seven"]}), tmp_path / "table.parquet")
    skips = Skips()
    names = ["plain.jsonl", "packed.jsonl.gz", "note.txt.zst", "table.parquet"]
    documents = list(read([tmp_path / name for name in names], skips))
    assert [(d.id, d.text) for d in documents] == [
        ("plain.jsonl#1", "one"),
        ("plain.jsonl#3", "二"),
        ("packed.jsonl.gz#1", "three"),
        ("packed.jsonl.gz#2", "four"),
        ("note.txt.zst", "five 五"),
        ("table.parquet#1", "six"),
        ("table.parquet#3", "seven"),
    ]
    assert skips.listed == [("table.parquet#2", "no text")]


def test_what_cannot_be_used_is_counted_and_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "good.txt").write_text("good")
    (corpus / "bytes.txt").write_bytes(b"caf\xe9")
    (corpus / "binary.txt").write_bytes(b"a\0b")
    (corpus / "empty.txt").write_text(" \n")
    (corpus / "large.txt").write_text("x" * 101)
    (corpus / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 10)[:-12])
    (corpus / "lines.jsonl").write_bytes(
        b'{"text": "ok"}\n{"text": 1}\nnot json\n' + b"[" * 90 + b"\n" + lines({"text": "y" * 300}, {"text": "end"})
    )
    parquet.write_table(pyarrow.table({"body": ["x"]}), corpus / "t.parquet")
    skips = Skips()
    assert [d.id for d in read([corpus], skips)] == ["c/good.txt", "c/lines.jsonl#1", "c/lines.jsonl#6"]
    reasons = {where.split(" ")[0]: reason for where, reason in skips.listed}
    assert reasons == {
        "c/bytes.txt": "not UTF-8",
        "c/binary.txt": "binary",
        "c/empty.txt": "empty",
        "c/large.txt": "too large",
        "c/cut.txt.gz": "unreadable",
        "c/lines.jsonl#2": "broken json line",
        "c/lines.jsonl#3": "broken json line",
        "c/lines.jsonl#4": "broken json line",
        "c/lines.jsonl#5": "too large",
        "c/t.parquet": "no column 'text'",
    }
    assert skips.summary().startswith("10 skipped: 3 broken json line, 2 too large")


def test_deeply_nested_json_is_a_broken_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"[" * 1_000_000 + b"\n" + lines({"text": "end"}))
    assert [d.id for d in read([tmp_path / "x.jsonl"], Skips())] == ["x.jsonl#2"]


def test_a_lone_surrogate_in_json_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    assert [d.text for d in read([tmp_path / "x.jsonl"], Skips())] == ["a\ufffdb"]


def test_the_list_of_skips_is_bounded_and_the_counts_are_not(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"bad\n" * (LISTED + 5) + lines({"text": "end"}))
    skips = Skips()
    assert len(list(read([tmp_path / "x.jsonl"], skips))) == 1
    assert (skips.counts["broken json line"], len(skips.listed)) == (LISTED + 5, LISTED)


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        read([tmp_path / "nowhere"], Skips())


def test_a_corpus_without_documents_is_refused_and_says_why(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"1 skipped: 1 not UTF-8"):
        list(read([tmp_path], Skips()))


def test_two_inputs_of_one_name_are_refused_because_their_ids_would_collide(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "data").mkdir(parents=True)
    with pytest.raises(InputError, match="same name"):
        read([tmp_path / "a" / "data", tmp_path / "b" / "data"], Skips())


def test_the_standard_library_is_a_corpus_of_code_and_prose_and_the_same_each_time():
    documents = list(standard_library(Skips()))
    ids = [d.id for d in documents]
    assert ids == [d.id for d in standard_library(Skips())]
    assert len(ids) == len(set(ids)) > 400
    assert sum(len(d.text) for d in documents) > 5_000_000
    assert {d.source for d in documents} == {"python-code", "python-prose"}
    assert "stdlib/json/decoder.py" in ids
    assert not any(part in i.split("/") for i in ids for part in ("site-packages", "test", "idle_test", "lib2to3"))
    assert not any(sysconfig.get_path("stdlib") in i for i in ids)


def test_the_language_reference_is_read_as_prose_without_running_its_file(tmp_path, monkeypatch):
    (tmp_path / "pydoc_data").mkdir()
    code = "raise SystemExit\ntopics = {'b': 'about b', 'a': 'about ' 'a'}\n"
    (tmp_path / "pydoc_data" / "topics.py").write_text(code)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(Path(tmp_path)))
    documents = list(standard_library(Skips()))
    assert [(d.id, d.text) for d in documents] == [("stdlib/topics/a", "about a"), ("stdlib/topics/b", "about b")]
