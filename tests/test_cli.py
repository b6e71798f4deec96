"""The command line: fast without torch, one-line errors, documented exit codes, one meaning per spelling."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import benthic
from benthic import cli
from benthic.base.errors import BenthicError, CheckpointError, DoesNotFit, InputError, Interrupted
from benthic.jobs import doctor, env

ROOT = Path(__file__).resolve().parents[1]


def python(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that sees this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture(autouse=True)
def _quiet_logger():
    """The command line configures the package's logger; the other tests want it as it was."""
    logger = logging.getLogger("benthic")
    before = logger.handlers, logger.level
    yield
    logger.handlers, level = before
    logger.setLevel(level)


# ---- speed ------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numpy", "fastapi", "matplotlib", "tensorboard", "tokenizers", "pyarrow")
LINES = [
    [],
    ["--help"],
    ["demo", "--help"],
    ["generate", "--help"],
    ["serve", "--help"],
    ["demo", "--pretrain.max-step", "3"],
    ["generate"],
    ["env"],
    ["completion", "bash"],
]


@pytest.mark.parametrize("argv", LINES, ids=lambda argv: " ".join(argv) or "nothing")
def test_help_and_usage_errors_import_nothing_heavy(argv):
    program = "import sys; from benthic.cli import main; main(sys.argv[1:]); print('loaded', *sys.modules)"
    run = python(program, *argv)
    loaded = set(run.stdout.rsplit("loaded ", 1)[1].split())
    assert loaded.isdisjoint(HEAVY)
    assert "benthic.cli" in loaded


def test_import_benthic_loads_no_dependency_and_offers_what_it_says():
    run = python("import sys, benthic; print(*dir(benthic)); print(*sys.modules)")
    names, modules = run.stdout.splitlines()
    assert names.split() == benthic.__all__ == ["LLM", "SamplingParams", "__version__", "load"]
    assert {name.split(".")[0] for name in modules.split()}.isdisjoint({*HEAVY, "tyro", "rich"})


def test_every_public_name_resolves_and_an_unknown_one_is_an_attribute_error():
    from benthic.inference.config import SamplingParams
    from benthic.inference.llm import LLM
    from benthic.model.hf import load

    assert (benthic.LLM, benthic.SamplingParams, benthic.load) == (LLM, SamplingParams, load)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = benthic.lod


def test_the_version_is_the_installed_one(capsys):
    try:
        installed = version("benthic")
    except PackageNotFoundError:
        pytest.skip("benthic is not installed, only checked out")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"benthic {installed}\n"


# ---- flags ------------------------------------------------------------------------------------------------------


def demo(*words: str):
    """The config that `benthic demo` would run."""
    return cli.parse(["demo", *words])[1].config()


@pytest.mark.parametrize("smoke", [False, True])
def test_defaults_are_those_of_the_chosen_recipe(smoke):
    from benthic.recipes import small, tiny

    flag = ["--smoke"] if smoke else []
    assert demo(*flag) == demo("--recipe", "tiny", *flag) == tiny.demo(smoke=smoke)
    assert demo(*flag, "--recipe=small") == small.demo(smoke=smoke)
    assert demo(*flag, "--recipe=small", "--seed", "3") == dataclasses.replace(small.demo(smoke=smoke), seed=3)


def test_dash_and_underscore_and_equals_sign_mean_the_same():
    forms = (
        ["--pretrain.max-steps", "7"],
        ["--pretrain.max_steps", "7"],
        ["--pretrain.max-steps=7"],
        ["--pretrain.max_steps=7"],
    )
    assert {demo(*form).pretrain.max_steps for form in forms} == {7}


def test_corpus_takes_many_paths_under_both_names():
    paths = (Path("a"), Path("b c"))
    assert demo("--corpus", "a", "b c").corpus.paths == paths
    assert demo("--corpus.paths", "a", "b c").corpus.paths == paths


def test_every_field_of_the_demo_has_a_flag_with_help(capsys):
    assert cli.main(["demo", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = re.findall(r"(--[a-z][\w.-]*)(.*?)(?= --[a-z]|$)", page)
    assert len(flags) > 100
    assert "--grpo.num-generations" in dict(flags)
    words = {flag: re.sub(r"\{.*?\}|\[.*?\]|[A-Z]{3,}", "", text) for flag, text in flags if flag != "--help"}
    assert [flag for flag, text in words.items() if not re.search(r"\w.*\(default", text)] == []


def test_common_options_are_taken_by_every_verb():
    for name, words in {"demo": [], "generate": ["m"], "chat": ["m"], "serve": ["m"], "doctor": [], "env": []}.items():
        common = cli.parse([name, *words, "-v", "--debug"])[2]
        assert (common.verbose, common.debug, common.quiet) == (True, True, False)


def test_generate_takes_a_model_and_prompts():
    _, config, _ = cli.parse(["generate", "folder", "one", "two three", "--top_p=0.5"])
    assert (config.model, config.prompts, config.top_p) == ("folder", ("one", "two three"), 0.5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--pretrain.max-step", "3"], "did you mean '--pretrain.max-steps'"),
        (["demo", "--pretrain.max_step=3"], "did you mean '--pretrain.max-steps'"),
        (["demo", "--sead", "3"], "did you mean '--seed'"),
        (["serve", "--modl", "x"], "unknown flag --modl"),
        (["demo", "--recipe", "big"], "'tiny', 'small'"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed"], "--seed"),
        (["demo", "word"], "unexpected word 'word'"),
        (["demo", "--sft.max-steps", "0"], "max_steps=0"),
        (["generate"], "MODEL"),
        (["serve", "m", "--port", "99999"], "port"),
        (["completion", "powershell"], "'bash', 'zsh', 'fish'"),
        (["generat"], "did you mean 'generate'"),
        (["--verson"], "unknown verb"),
    ],
    ids=" ".join,
)
def test_a_usage_error_is_one_line_on_standard_error_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"benthic: error: .+ -> .+\n", err)
    assert message in err


def test_usage_errors_read_the_same_on_an_ascii_terminal():
    program = "import sys; from benthic.cli import main; sys.exit(main(['demo', '--recipe', 'big']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert "invalid choice 'big'" in run.stderr


# ---- errors and exit codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BenthicError("a -> b"), 1),
        (CheckpointError("a -> b"), 1),
        (InputError("a -> b"), 2),
        (DoesNotFit("a -> b"), 3),
        (MemoryError("1 GB"), 3),
        (PermissionError(13, "Permission denied", "/x"), 1),
        (KeyError("x"), 1),
    ],
    ids=repr,
)
def test_each_error_ends_with_its_exit_code_and_one_line(error, code, monkeypatch, capsys):
    monkeypatch.setattr(env, "run", lambda: (_ for _ in ()).throw(error))
    assert cli.main(["env"]) == code
    assert re.fullmatch(r"benthic: error: .+ -> .+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (Interrupted(2, "saved step 7"), 130, "benthic: saved step 7\n"),
        (Interrupted(15, "saved step 7"), 143, "benthic: saved step 7\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_a_stop_that_was_asked_for_is_no_error(stop, code, line, monkeypatch, capsys):
    monkeypatch.setattr(env, "run", lambda: (_ for _ in ()).throw(stop))
    assert cli.main(["env"]) == code
    assert capsys.readouterr().err == line


def test_only_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(env, "run", lambda: 1 / 0)
    assert cli.main(["env"]) == 1
    with pytest.raises(ZeroDivisionError):
        cli.main(["env", "--debug"])


def test_a_reader_that_leaves_early_is_no_error():
    line = f"{sys.executable} -c 'import sys; from benthic.cli import main; sys.exit(main([\"env\"]))' | true"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert run.stderr == ""


def test_messages_go_to_standard_error_and_quiet_hides_them(monkeypatch, capsys):
    def talk():
        logging.getLogger("benthic").info("progress")
        print("result")

    monkeypatch.setattr(env, "run", talk)
    cli.main(["env"])
    assert capsys.readouterr() == ("result\n", "progress\n")
    cli.main(["env", "--quiet"])
    assert capsys.readouterr() == ("result\n", "")


def test_python_m_benthic_is_benthic():
    run = subprocess.run([sys.executable, "-m", "benthic", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0
    assert all(f"  {verb}" in run.stdout for verb in cli.VERBS)


# ---- the small verbs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_the_flags_of_the_demo(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in (*cli.VERBS, "--pretrain.max-steps", "--temperature"))


def test_the_bash_completion_is_valid_bash(capsys):
    cli.main(["completion", "bash"])
    run = subprocess.run(["bash", "-n"], input=capsys.readouterr().out, capture_output=True, text=True)
    assert run.stderr == ""


def test_env_lists_every_variable_that_the_package_reads(capsys, monkeypatch):
    monkeypatch.setenv("BENTHIC_API_KEY", "a-secret")
    read = set()
    for path in (ROOT / "benthic").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:\.get\(|\[|\.setdefault\(|\.pop\()\"(\w+)\"", text))
        assert text.count("environ") - text.count("environment") == len(re.findall(r"environ[.\[]", text))
    assert "RANK" in read
    assert read <= set(env.VARIABLES)
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "a-secret" not in out
    assert all(name in out for name in read)


def test_doctor_looks_for_exactly_the_declared_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.match(r"[\w-]+", need)[0] for need in project["dependencies"]] == doctor.NEEDED
    assert [re.match(r"[\w-]+", need)[0] for need in project["optional-dependencies"]["server"]] == [*doctor.OPTIONAL]


def test_doctor_reports_json_and_fails_only_for_what_is_broken(monkeypatch, capsys):
    broken = doctor.Finding(name="x", status="broken", detail="d", fix="f")
    note = doctor.Finding(name="y", status="note", detail="d", fix="f")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([note]),))
    assert cli.main(["doctor"]) == 0
    assert "y  d -> f" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([note, broken]),))
    assert cli.main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [finding["status"] for finding in findings] == ["note", "broken"]
    assert all(finding["fix"] for finding in findings)


def test_doctor_finds_this_machine_sound(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert all(name in out for name in ("torch", "gloo", "disk", "landlock", "port 8000", "clock"))
    assert not list(tmp_path.iterdir())


def test_doctor_names_a_transport_that_does_not_work(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    (finding,) = doctor.processes()
    assert finding.status == "broken"
    assert finding.fix
