"""Data never becomes code: a gate over the syntax tree of every file of the package."""

import ast

import pytest
from test_floors import modules

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch.hub", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("numpy", "load"),
    ("np", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("importlib", "import_module"),
    ("importlib", "__import__"),
    ("runpy", "run_path"),
    ("runpy", "run_module"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
}


def faults(module: str, source: str) -> list[str]:
    """Every place where the module could turn bytes into code, and every assert."""
    return [f"{module}:{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _wrong(node)]


def _wrong(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [f"import {a.name}" for a in names if a.name.split(".")[0] in MODULES]
        case ast.ImportFrom(module=str(source), names=names):
            banned = source.split(".")[0] in MODULES
            return [f"from {source} import {a.name}" for a in names if banned or (source, a.name) in ATTRIBUTES]
        case ast.Attribute(attr=name) if (ast.unparse(node.value), name) in ATTRIBUTES:
            return [ast.unparse(node)]
        case ast.Name(id=name) if name in CALLS:
            return [name]
        case ast.keyword(arg="shell", value=value) if not (isinstance(value, ast.Constant) and value.value is False):
            return ["shell=" + ast.unparse(value)]
        case ast.keyword(arg="allow_pickle", value=value) if not (
            isinstance(value, ast.Constant) and value.value is False
        ):
            return ["allow_pickle=" + ast.unparse(value)]
        case ast.Assert():
            return ["assert: it vanishes under python -O; write `if ...: raise`"]
    return []


def test_nothing_in_the_package_turns_data_into_code_and_nothing_asserts():
    assert [fault for module, source in modules() for fault in faults(module, source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from marshal import loads",
        "import shelve",
        "x = eval(text)",
        "exec(text)",
        "run = exec\nrun(text)",
        "import builtins\nbuiltins.exec(text)",
        "x = torch.load(path)",
        "x = torch.load(path, weights_only=True)",
        "from torch import load",
        "import yaml\nyaml.load(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "np.load(path, allow_pickle=True)",
        "def f():\n    def g():\n        assert x",
    ],
)
def test_each_way_to_run_data_is_caught(source):
    assert faults("m", source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile(text)",
        "torch.compile(model)",
        "subprocess.run(['true'], shell=False)",
        "import importlib.metadata\nimportlib.metadata.version('torch')",
        "json.load(file)",
        "Shards.load(path)",
    ],
)
def test_harmless_namesakes_are_not_refused(source):
    assert faults("m", source) == []
