import hashlib
import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.errors import InputError
from benthic.tokenizer import encoder, pretokenizer, tokens
from benthic.tokenizer.encoder import FastEncoder, PlainEncoder, whole_characters
from benthic.tokenizer.tokenizer import CHECKSUMS, CONFIG, VOCABULARY, Tokenizer

# One or more characters of every class that the pre-tokenizer tells apart, and those that naive regexes lose.
NASTY = [*"aZé1٣½好ア・゛゠々〇한ع😀!+€«'_ \t\n\r\u200b\ufeff\u0558\u00a0\u3000\u2028\x00\x85\u200d\u3040\u0301\u0e33"]
nasty = st.lists(
    st.one_of(st.sampled_from(NASTY), st.sampled_from(["  ", "\r\n", "123456", "模型", "the", "aaaa", tokens.BOS]))
).map("".join)


def plain(tokenizer: Tokenizer) -> PlainEncoder:
    return PlainEncoder(tokenizer._spec, "test")


@settings(max_examples=250, deadline=None)
@given(text=st.one_of(nasty, st.text()))
def test_fast_ids_equal_the_tokenizers_library(tokenizer, text):
    assert isinstance(tokenizer._encoder, FastEncoder)
    assert tokenizer.encode(text) == plain(tokenizer).encode(text)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(nasty, st.text()))
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_pre_tokenizer_is_the_released_one():
    digest = hashlib.sha256(json.dumps(pretokenizer.V3, sort_keys=True).encode()).hexdigest()
    assert digest == "d8d32910cbb77e54a181e9b3f9a6808eed7fc330747bbcd913ef8c390bc1c9f9"


def test_the_single_regex_cuts_where_the_released_sequence_cuts():
    """Makes every substring a token, so that tiktoken shows its pieces."""
    import tiktoken

    rng = random.Random(0)
    texts = ["".join(rng.choices(NASTY, k=rng.randint(1, 8))) for _ in range(6000)]
    sequence = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(entry["pattern"]["Regex"]), "isolated")
            for entry in pretokenizer.V3["pretokenizers"][:3]
        ]
    )
    ranks = {bytes([byte]): byte for byte in range(256)}
    for data in map(str.encode, texts):
        for start in range(len(data)):
            for stop in range(start + 2, len(data) + 1):
                ranks.setdefault(data[start:stop], len(ranks))
    engine = tiktoken.Encoding("x", pat_str=pretokenizer.SINGLE_REGEX, mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        pieces = [engine.decode_single_token_bytes(i).decode() for i in engine.encode_ordinary(text)]
        assert pieces == [piece for piece, _ in sequence.pre_tokenize_str(text)], ascii(text)


@pytest.mark.parametrize("run", [" ", "\u200b", "\n", "a", "好"])
def test_a_run_of_a_million_characters_is_encoded_exactly(tokenizer, run):
    text = run * 1_100_000 + "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_runs_go_to_the_plain_engine_and_books_do_not(monkeypatch):
    monkeypatch.setattr(encoder, "BLOCK", 100)
    assert encoder._has_long_run("word " * 10 + " " * 200 + "word")
    assert not encoder._has_long_run(("word " + " " * 90) * 50)


def test_surrogates_are_joined_or_replaced(tokenizer):
    assert whole_characters("a\ud83d\ude00b") == "a😀b"
    assert whole_characters("a\ud800b") == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\udfffb")) == "a\ufffdb"


def test_names_of_added_tokens_in_text_stay_text(tokenizer):
    added = set(tokenizer.special.values())
    for name in tokenizer.special:
        ids = tokenizer.encode(f"say {name} now")
        assert not added & set(ids)
        assert tokenizer.decode(ids) == f"say {name} now"


def test_the_batch_equals_single_calls_on_any_number_of_threads(tokenizer):
    texts = [f"text {i} 模型 {i * 37}" for i in range(50)]
    assert tokenizer.encode_batch(texts, 4) == tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(tokenizer):
    first_byte = tokenizer.encode("好")[0]
    if len(tokenizer.bytes_of(first_byte)) == 3:
        first_byte = next(i for i in range(3, 259) if tokenizer.bytes_of(i) == b"\xe5")
    assert tokenizer.decode([first_byte]) == "\ufffd"


def test_skip_special_drops_control_tokens_and_keeps_thinking(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.id_of(tokens.THINK), *tokenizer.encode("hm"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == f"{tokens.BOS}<think>hm{tokens.EOS}"
    assert tokenizer.decode(ids, skip_special=True) == "<think>hm"


def test_an_unknown_token_names_its_neighbour(tokenizer):
    with pytest.raises(InputError, match=r"unknown token '<thinks>'.*did you mean '<think>'"):
        tokenizer.id_of("<thinks>")


@pytest.mark.parametrize("bad", [-1, 420, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, bad):
    with pytest.raises(InputError, match=str(bad)):
        tokenizer.decode([bad])


def test_a_saved_tokenizer_loads_with_the_same_ids_here_and_in_the_tokenizers_library(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    text = "The quick 模型 コーヒー・カップ 12345\n\n  return a+b"
    loaded = Tokenizer.load(tmp_path / "new")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / VOCABULARY))
    assert loaded.encode(text) == tokenizer.encode(text) == library.encode(text).ids
    assert library.decode(library.encode(text).ids) == text
    assert library.get_vocab_size() == tokenizer.vocab_size
    assert {name: library.token_to_id(name) for name in loaded.special} == loaded.special == tokenizer.special
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)


def test_a_file_with_merges_as_strings_and_another_pretokenizer_uses_the_plain_engine(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / VOCABULARY).read_bytes())
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    assert isinstance(Tokenizer(spec, tokenizer._config)._encoder, FastEncoder)
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][-1]
    other = Tokenizer(spec, tokenizer._config)
    assert isinstance(other._encoder, PlainEncoder)
    assert other.decode(other.encode(f"a {tokens.EOS} b")) == f"a {tokens.EOS} b"


def test_merges_out_of_id_order_use_the_plain_engine(tokenizer):
    spec = json.loads(json.dumps(tokenizer._spec))
    spec["model"]["merges"][:2] = spec["model"]["merges"][1::-1]
    assert isinstance(Tokenizer(spec, tokenizer._config)._encoder, PlainEncoder)


def test_a_folder_without_the_files_names_the_missing_one(tokenizer, tmp_path):
    with pytest.raises(InputError, match=VOCABULARY):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(InputError, match=CONFIG):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"', b"{}", b'{"model": {}}'])
@pytest.mark.parametrize("name", [VOCABULARY, CONFIG])
def test_malformed_content_is_refused_naming_the_file(tokenizer, tmp_path, name, content):
    tokenizer.save(tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("model", "vocab", "a"), 10**12, "ids"),
        (("model", "vocab", "a"), True, "ids"),
        (("model", "vocab", "a"), "7", "ids"),
        (("model", "vocab", "é 好"), 420, "byte alphabet"),
        (("model", "merges"), [["a", "never"]], "merge"),
        (("model", "merges"), [["a"]], "merge"),
        (("model", "merges"), {}, "model.merges"),
        (("model", "type"), "Unigram", "Unigram"),
        (("added_tokens",), [{"id": 0}], "content"),
        (("added_tokens",), [{"content": "x", "id": None}], "id of 'x'"),
        (("added_tokens",), [{"content": "x", "id": 0}] * 2, "twice"),
    ],
)
def test_a_tokenizer_json_that_makes_no_sense_is_refused_with_the_reason(tokenizer, path, value, problem):
    spec = json.loads(json.dumps(tokenizer._spec))
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=problem):
        Tokenizer(spec, tokenizer._config)


def flipped(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


@pytest.mark.parametrize("name", [VOCABULARY, CONFIG, CHECKSUMS])
def test_bit_flips_and_truncations_of_every_file_are_detected_by_name(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    rng = random.Random(5)
    damaged = [flipped(whole, rng) for _ in range(200)] + [whole[: rng.randrange(len(whole) - 1)] for _ in range(60)]
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="tokenizer"):
            Tokenizer.load(tmp_path)
    (tmp_path / name).write_bytes(whole)
    Tokenizer.load(tmp_path)


def test_without_the_checksums_a_flip_can_pass_unseen(tokenizer, tmp_path):
    """The negative control of the test above: parsing alone does not detect every flip."""
    tokenizer.save(tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    config = json.loads((tmp_path / CONFIG).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "chat_template": config["chat_template"] + "x"}))
    Tokenizer.load(tmp_path)
