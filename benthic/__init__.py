"""Benthic: the DeepSeek LLM system in one readable package.

The names below load what they need on first use, so that `import benthic` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benthic.inference.config import SamplingParams
    from benthic.inference.llm import LLM
    from benthic.model.hf import load

    __version__: str

__all__ = ["LLM", "SamplingParams", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from benthic.model.hf import load as value
    elif name == "LLM":
        from benthic.inference.llm import LLM as value
    elif name == "SamplingParams":
        from benthic.inference.config import SamplingParams as value
    elif name == "__version__":
        from importlib.metadata import version

        value = version("benthic")
    else:
        raise AttributeError(f"module 'benthic' has no attribute {name!r}; it offers {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
