"""Keys: where they come from, who they belong to, and how they are compared."""

import pytest

from benthic.base.errors import InputError
from benthic.server import keys
from benthic.server.config import ServeConfig
from benthic.server.keys import Keys, read_keys


def owners(config: ServeConfig) -> list[str]:
    return [owner for _, owner in read_keys(config)._owners]


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch):
    monkeypatch.delenv("BENTHIC_API_KEY", raising=False)


def test_every_key_opens_for_its_owner_and_no_other_does():
    several = Keys(["sk-one", "alice:sk-two", "alice:sk-three", "b.o_b-1:sk-four"])
    assert several.owner(b"sk-two") == several.owner(b"sk-three") == "alice"
    assert several.owner(b"sk-four") == "b.o_b-1"
    assert several.owner(b"sk-one") == Keys(["sk-one"]).owner(b"sk-one") != ""
    for wrong in (b"", b"sk-", b"sk-tw", b"sk-twoo", b"alice", b"alice:sk-two", b"sk-one\x00", b"\xff", b"SK-ONE"):
        assert several.owner(wrong) == ""
    assert not Keys()
    assert Keys().owner(b"") == ""


def test_the_owner_of_a_key_without_name_is_the_beginning_of_its_hash():
    owner = Keys(["sk-secret"]).owner(b"sk-secret")
    assert owner == "key-" + keys.hashlib.sha256(b"sk-secret").hexdigest()[:8]
    assert "secret" not in owner


@pytest.mark.parametrize("given", [b"sk-1", b"sk-3", b"sk-5", b"wrong", b""])
def test_all_keys_are_compared_by_digest_in_constant_time_whichever_is_right(monkeypatch, given):
    several = Keys([f"sk-{i}" for i in range(1, 6)])
    seen = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    several.owner(given)
    assert seen == [(32, 32)] * 5


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "model.example"])
def test_without_a_key_a_host_that_others_reach_is_refused(host, monkeypatch):
    with pytest.raises(InputError, match="BENTHIC_API_KEY"):
        read_keys(ServeConfig(model="m", host=host))
    monkeypatch.setenv("BENTHIC_API_KEY", "k")
    assert read_keys(ServeConfig(model="m", host=host)).owner(b"k")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_on_loopback_no_key_is_needed(host):
    assert not read_keys(ServeConfig(model="m", host=host))


def test_the_keys_come_from_flags_then_file_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTHIC_API_KEY", "env:e")
    file = tmp_path / "keys"
    file.write_text("# of the team\nfile:f\n\n  second:s  \n")
    assert owners(ServeConfig(model="m")) == ["env"]
    assert owners(ServeConfig(model="m", api_key_file=str(file))) == ["file", "second"]
    assert owners(ServeConfig(model="m", api_key_file=str(file), api_key=("flag:g", "again:h"))) == ["flag", "again"]


@pytest.mark.parametrize(
    "key", ["schlüssel", "a\nb", "a b", "", "name:", "bad name:key", "a:b:c", "x" * 33 + ":key", "<b>:key"]
)
def test_a_key_that_cannot_be_used_is_an_error_that_does_not_quote_it(key):
    with pytest.raises(InputError) as caught:
        Keys(["fine", key])
    assert "key\n" not in str(caught.value)
    assert "schlüssel" not in str(caught.value)


def test_a_key_that_is_given_twice_is_an_error():
    with pytest.raises(InputError, match="number 2 is given twice"):
        Keys(["a:k", "b:k"])


def test_a_file_without_keys_is_an_error(tmp_path):
    (tmp_path / "empty").write_text("\n# none yet\n")
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="api_key_file"):
            read_keys(ServeConfig(model="m", api_key_file=str(path)))


def test_any_origin_needs_a_key():
    with pytest.raises(InputError, match="allowed_origins"):
        read_keys(ServeConfig(model="m", allowed_origins=("*",)))
    assert read_keys(ServeConfig(model="m", allowed_origins=("*",), api_key=("k",)))


@pytest.mark.parametrize("origin", ["app.example", "https://a.example/", "https://a b", "null", "https://", "ftp://a"])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(InputError, match="allowed_origins"):
        ServeConfig(model="m", allowed_origins=(origin,))


def test_the_keys_are_not_in_the_configs_text():
    assert "sk-secret" not in repr(ServeConfig(model="m", api_key=("sk-secret",)))


@pytest.mark.parametrize(
    "fields",
    [{"port": 65536}, {"port": -1}, {"max_num_seqs": 0}, {"max_queued_requests": -1}, {"shutdown_timeout": -1.0},
     {"shutdown_timeout": float("nan")}, {"shutdown_timeout": float("inf")}, {"max_model_len": -1}, {"host": ""},
     {"request_timeout": 0.0}, {"request_timeout": float("inf")}],
)  # fmt: skip
def test_options_out_of_range_are_named(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ServeConfig(model="m", **fields)
