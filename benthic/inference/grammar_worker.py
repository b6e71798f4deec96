"""The process that compiles grammars, run as a script. Whoever waits for it kills it when it takes too long.

Lines of JSON. In: first {"vocab": [bytes as Latin-1], "vocab_size", "stop_token_ids", "threads", "bytes", "seconds"},
then [kind, text] each. Out: {} when ready, then {"grammar": text} or {"error": text} each.
"""

import json
import os
import signal
import sys

import xgrammar

NEW_MEMORY = "VmSize:"


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    head = json.loads(sys.stdin.readline())
    info = xgrammar.TokenizerInfo(
        [token.encode("latin-1") for token in head["vocab"]],
        xgrammar.VocabType.RAW,
        vocab_size=head["vocab_size"],
        stop_token_ids=head["stop_token_ids"],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=head["threads"], cache_enabled=False)
    _limit_memory(head["bytes"])
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        _alarm(head["seconds"])
        print(json.dumps(_compile(compiler, *json.loads(line))), file=answers, flush=True)
        _alarm(0)


def _alarm(seconds: int) -> None:
    """End this process after a time, whether or not anybody is left to kill it. Where the system cannot, do nothing."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _compile(compiler: xgrammar.GrammarCompiler, kind: str, text: str) -> dict[str, str]:
    make = {
        "json": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "grammar": compiler.compile_grammar,
        "structural_tag": compiler.compile_structural_tag,
    }[kind]
    try:
        return {"grammar": make(text).serialize_json()}
    except (RuntimeError, MemoryError) as error:  # what the library raises for texts that it does not understand
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": lines[-1].split("] ", 1)[-1]}


def _limit_memory(more: int) -> None:
    """Let the process grow by `more` bytes from here, where the system can say so."""
    try:
        import resource  # POSIX only

        with open("/proc/self/status", encoding="ascii") as status:
            now = next(int(line.split()[1]) * 1024 for line in status if line.startswith(NEW_MEMORY))
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


if __name__ == "__main__":
    main()
