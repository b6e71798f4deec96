"""The documentation is true: its Python runs, its commands parse, its links lead somewhere."""

import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_floors import ROOT

from benthic import cli
from benthic.base.errors import InputError

PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINKED = [*PAGES, *sorted((ROOT / "docs").rglob("*/*.md")), *(ROOT / f"{n}.md" for n in ("CONTRIBUTING", "SECURITY"))]
OPERATORS = ("|", ">", ">>", "<", "&&", "&", ";")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced code in one of the languages."""
    return [code for language, code in _BLOCK.findall(text) if language in languages]


def commands(text: str, program: str = "benthic") -> Iterator[list[str]]:
    """The words after `program` in every command of shell blocks, and after `$` in console blocks."""
    lines = "".join(blocks(text.replace("\\\n", " "), "sh", "bash")).splitlines()
    lines += [line[2:] for line in "".join(blocks(text, "console")).splitlines() if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        words = list(itertools.dropwhile(lambda word: re.fullmatch(r"\w+=.*", word), words))
        if words and Path(words[0]).name == program:
            yield list(itertools.takewhile(lambda word: word not in OPERATORS, words[1:]))


def faults(text: str) -> list[str]:
    """Commands that the command line or the Makefile would refuse."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    asked = {word for words in commands(text, "make") for word in words if "=" not in word}
    found = [f"make {word}" for word in sorted(asked.difference(targets))]
    for words in commands(text):
        if words in ([], ["--help"], ["--version"]):
            continue
        try:
            cli.parse(words)
        except InputError as error:
            found.append(f"benthic {' '.join(words)}: {error}")
        except SystemExit as help_page:
            if help_page.code:
                raise
    return found


def dead_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(_BLOCK, "", text))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    return [target for target in local if target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_python_snippet_runs(page, tmp_path, monkeypatch, model_folder):
    """The snippets of a page run one after the other in one namespace, beside a model in runs/demo/model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "runs" / "demo" / "model")
    namespace = {"__name__": "snippet"}
    for number, code in enumerate(blocks(page.read_text(encoding="utf-8"), "python", "py"), 1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_parses(page, capsys):
    assert faults(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


WRONG = """```sh
$ benthic demo --pretrain.max-step 3 | tee log
make dmeo # benthic nothing
NO_COLOR=1 .venv/bin/benthic gen
```
```console
$ benthic serve m --prot 1
benthic is what this output line begins with
```"""


def test_wrong_commands_and_dead_links_are_found():
    assert [fault.partition(":")[0] for fault in faults(WRONG)] == [
        "make dmeo",
        "benthic demo --pretrain.max-step 3",
        "benthic gen",
        "benthic serve m --prot 1",
    ]
    links = "[a](docs/nowhere.md) [b](https://x.y) [c](#top) [d](docs/index.md#start)"
    assert dead_links(ROOT / "README.md", links) == ["docs/nowhere.md"]


def test_the_index_is_looked_at():
    assert "docs/index.md" in NAMES
    assert len(list(commands((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))) >= 5
