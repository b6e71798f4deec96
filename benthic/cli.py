"""The command line: verbs, their options (built by tyro from frozen dataclasses), exit codes. No logic of its own.

Nothing here imports torch before a verb runs, so that help and usage errors answer at once.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import operator
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from benthic.base.errors import BenthicError, InputError, Interrupted, did_you_mean
from benthic.jobs.config import (
    BenchConfig,
    ChatConfig,
    CompletionConfig,
    ConvertConfig,
    DoctorConfig,
    EnvConfig,
    ExpertsConfig,
    GenerateConfig,
    InspectConfig,
)
from benthic.recipes.demo import DemoConfig
from benthic.server.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every verb."""

    quiet: bool = False
    """Results and errors only: no progress."""
    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """Say more."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Demo(DemoConfig):
    """Every number of the chosen recipe, which gives the defaults, and two conveniences."""

    recipe: Literal["tiny", "small"] = "tiny"
    """Where the defaults come from. tiny: minutes on a CPU; small: one GPU."""
    smoke: bool = False
    """A few steps of every stage, to see that it works."""
    files: Annotated[tuple[Path, ...], arg(name="corpus")] = ()
    """Short for corpus.paths."""

    def config(self) -> DemoConfig:
        """The recipe's own dataclass."""
        named: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(DemoConfig)}
        named["corpus"] = dataclasses.replace(self.corpus, paths=self.files or self.corpus.paths)
        return DemoConfig(**named)


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What one verb is for, what its flags fill, and what it does with that."""

    summary: str
    config: type  # dataclass whose fields are the flags
    run: Callable[[Any], int | None]  # takes the filled config; may return an exit code


def _demo(options: Demo) -> None:
    # Waiting CPU threads sleep soon: long spinning halves the speed as soon as another program wants a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from benthic.base.signals import Stop
    from benthic.jobs import demo

    stop = Stop()
    stop.install()
    demo.run(options.config(), stop)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The flags that decide the defaults of all others."""

    recipe: Literal["tiny", "small"] = "tiny"
    smoke: bool = False


def _demo_defaults(words: list[str]) -> Demo:
    """The recipe that the command line asks for."""
    choice, _ = _tyro(_Choice, "benthic demo", "", [word for word in words if word not in ("-h", "--help")])
    if choice.recipe == "tiny":
        from benthic.recipes import tiny as recipe
    else:
        from benthic.recipes import small as recipe
    config = recipe.demo(smoke=True) if choice.smoke else recipe.demo()
    named: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    named["recipe"] = choice.recipe
    return Demo(**named)


def _generate(config: GenerateConfig) -> None:
    from benthic.jobs import generate

    generate.run(config)


def _chat(config: ChatConfig) -> None:
    from benthic.jobs import chat

    chat.run(config)


def _serve(config: ServeConfig) -> None:
    from benthic.server.app import serve

    serve(config)


def _bench(config: BenchConfig) -> None:
    from benthic.jobs import bench

    bench.run(config)


def _inspect(config: InspectConfig) -> None:
    from benthic.jobs import inspect

    inspect.run(config)


def _convert(config: ConvertConfig) -> None:
    from benthic.jobs import convert

    convert.run(config)


def _experts(config: ExpertsConfig) -> None:
    from benthic.jobs import experts

    experts.run(config)


def _doctor(config: DoctorConfig) -> int:
    from benthic.jobs import doctor

    return doctor.run(config)


def _env(config: EnvConfig) -> None:
    from benthic.jobs import env

    env.run()


def _completion(config: CompletionConfig) -> None:
    verbs = [
        Annotated[_options(name, []), tyro.conf.subcommand(name, description=verb.summary, prefix_name=False)]
        for name, verb in VERBS.items()
    ]
    _tyro(functools.reduce(operator.or_, verbs), "benthic", "", ["--tyro-print-completion", config.shell])


VERBS = {
    "demo": Verb(summary="From raw text to a small reasoning model, in one run.", config=Demo, run=_demo),
    "generate": Verb(summary="Continue prompts and print what the model writes.", config=GenerateConfig, run=_generate),
    "chat": Verb(summary="Talk to a model in the terminal.", config=ChatConfig, run=_chat),
    "serve": Verb(summary="Serve a model over the OpenAI chat API.", config=ServeConfig, run=_serve),
    "bench": Verb(summary="Measure the engine on this machine.", config=BenchConfig, run=_bench),
    "inspect": Verb(
        summary="What a model is made of: parameters, compute, cache, memory.", config=InspectConfig, run=_inspect
    ),
    "convert": Verb(summary="Rewrite a checkpoint: layout, precision, shard size.", config=ConvertConfig, run=_convert),
    "experts": Verb(summary="Find redundant or idle experts; merge or drop them.", config=ExpertsConfig, run=_experts),
    "doctor": Verb(summary="Check this machine: what is broken, and the fix.", config=DoctorConfig, run=_doctor),
    "env": Verb(summary="List the environment variables that are read.", config=EnvConfig, run=_env),
    "completion": Verb(summary="Print a completion script for a shell.", config=CompletionConfig, run=_completion),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line (default: this process's own); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of standard output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Interrupted as stopped:
        print(f"benthic: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        if "--debug" in argv:
            raise
        code, message = _explain(error)
        print(f"benthic: error: {message}", file=sys.stderr)
        return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from benthic import __version__

        print(f"benthic {__version__}")
        return 0
    try:
        verb, config, common = parse(argv)
        _start_logging(common)
        return verb.run(config) or 0
    except SystemExit as done:  # tyro has printed a help page or a completion script
        return int(done.code or 0)


def parse(argv: list[str]) -> tuple[Verb, Any, Common]:
    """The verb of a command line, its filled config and the common options. Raises InputError for a usage error."""
    name, *words = argv
    if name not in VERBS:
        near = [verb for verb in VERBS if verb.startswith(name)] or VERBS
        raise InputError(f"unknown verb {name!r} -> see benthic --help{did_you_mean(name, near)}")
    options = _options(name, words)
    prog = f"benthic {name}"
    try:
        parsed, unknown = _tyro(options, prog, VERBS[name].summary, words)
    except InputError:
        _refuse_unknown_flags(words, options, prog)  # the likelier mistake, and the better message
        raise
    if unknown:
        _refuse_unknown_flags(unknown, options, prog)
        raise InputError(f"unexpected word {unknown[0]!r} after {prog} -> see {prog} --help")
    return VERBS[name], parsed.config, parsed.common


def _refuse_unknown_flags(words: list[str], options: type, prog: str) -> None:
    """Raise InputError for the first word that looks like a flag and is none."""
    flags = _flags(options, prog)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise InputError(f"unknown flag {flag} of {prog} -> see {prog} --help{did_you_mean(flag, flags)}")


def _options(name: str, words: list[str]) -> type:
    """A dataclass of the flags of one verb, with the common ones at the end."""
    config = Annotated[VERBS[name].config, arg(name="")]
    own = ("config", config, _demo_defaults(words)) if name == "demo" else ("config", config)
    common = ("common", Annotated[Common, arg(name="")])
    return dataclasses.make_dataclass("Options", [own, common], frozen=True, kw_only=True)


def _tyro(config: Any, prog: str, summary: str, words: list[str]) -> tuple[Any, list[str]]:
    """(filled config, words it did not take). tyro draws its errors as boxes; here they become one line."""
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                config, prog=prog, description=summary, args=words, return_unknown_args=True, config=markers
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_first_paragraph(box.getvalue())} -> see {prog} --help") from None


def _first_paragraph(box: str) -> str:
    """The text of an error box up to its first rule, without the title. Boxes are ASCII where the terminal is."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    text = itertools.dropwhile(_is_rule, lines)
    return " ".join(itertools.takewhile(lambda line: not _is_rule(line), text)).replace("'config.", "'")


def _is_rule(line: str) -> bool:
    return line.startswith(("──", "---"))


def _flags(config: Any, prog: str) -> list[str]:
    """Every flag, as the help page shows them."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _tyro(config, prog, "", ["--help"])
    return re.findall(r"^\W*?(?:-\w, )?(--[a-z][\w.-]*)", page.getvalue(), re.MULTILINE)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: benthic [-h] [--version] VERB [OPTIONS]\n\n"
        "The DeepSeek LLM system in one package: data, tokenizer, pretraining, post-training, evaluation, server.\n\n"
        f"verbs:\n{verbs}\n\n"
        "benthic VERB --help explains the options of a verb. Start with: benthic demo"
    )


class _ToStderr(logging.Handler):
    """Messages to whatever standard error is now: a live progress line puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _start_logging(common: Common) -> None:
    logger = logging.getLogger("benthic")
    logger.handlers = [_ToStderr()]
    quiet = common.quiet or os.environ.get("RANK", "0") != "0"  # of processes that torchrun started, the first speaks
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if common.verbose else logging.INFO)


def _explain(error: Exception) -> tuple[int, str]:
    """(exit code, one line) for an error."""
    if isinstance(error, BenthicError):
        return error.exit_code, str(error)
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":  # torch's own, not imported here
        return 3, f"out of memory ({text}) -> use a smaller model, batch or context"
    if isinstance(error, OSError):
        return 1, f"{text} -> check the path and its permissions"
    return 1, f"{kind}: {text} -> a bug or an unforeseen situation; --debug shows where"
