import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "train"))  # training_example is shared


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Bits are promised for one thread count, and tiny tensors are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """Every byte is a token, nothing is merged."""
    from benthic.tokenizer import bpe

    return bpe.train(["some text to learn nothing from"], 266)
