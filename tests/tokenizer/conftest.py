import pytest

from benthic.tokenizer import bpe
from benthic.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt doesn't stop: 2024, 12345 and 3.14159 are numbers.\n",
    "def add(a, b):\n    return a + b  # 加法\n\n\nclass Point:\n\tx: int = 0\n",
    "深度求索的语言模型。我们从文本开始，学习推理。深度学习模型，语言模型。",
    "コーヒー・カップ と カタカナ・テスト。 café naïve e\u0301 Привет мир, привет!",
    "==== ---- **** aaaa aaaaaa abababab    \t\t  \n \n",
] * 3


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return bpe.train(TEXTS, 420)
