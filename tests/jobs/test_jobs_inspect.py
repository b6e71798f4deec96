"""The tables of `benthic inspect` say what the papers say."""

from pathlib import Path

import pytest

from benthic.base.errors import InputError
from benthic.cli import main
from benthic.model import hf
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.recipes import tiny
from benthic.recipes.models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name]) == 0
    assert "active per token" in capsys.readouterr().out


def test_v3_is_described_with_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "v3"])
    text = capsys.readouterr().out
    for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "70,272 B"):
        assert number in text


def test_a_folder_is_described_like_its_recipe_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.write_model(tmp_path / "m", initialise(Transformer(tiny.model()), 0.02, 0), None)
    main(["inspect", "tiny"])
    preset = capsys.readouterr().out.splitlines()[1:]
    picture = tmp_path / "m.png"
    assert main(["inspect", str(tmp_path / "m"), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines()[1 : len(preset) + 1] == preset
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("words", "message"), [(["v33"], "did you mean 'v3'"), (["v3", "--plot", "x.doc"], "png")])
def test_what_cannot_be_described_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *words]) == InputError.exit_code
    assert message in capsys.readouterr().err
