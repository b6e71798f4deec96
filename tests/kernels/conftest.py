"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before triton loads."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run; tests that ask for it are skipped without triton."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"
