import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Bits are promised for one thread count, and tiny tensors are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
