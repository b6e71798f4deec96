"""Tasks and models small enough to post-train in a second."""

from training_example import MODEL

from benthic.inference.request import Output
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tasks.task import Grade, Problem

WORDS = ModelConfig(**{**vars(MODEL), "vocab_size": 266})  # bytes and added tokens


def policy(seed: int = 0, std: float = 0.1) -> Transformer:
    return initialise(Transformer(WORDS), std=std, seed=seed)


class Digits:
    """Say a digit: a rule that random answers keep now and then."""

    def problems(self, split: str) -> list[Problem]:
        return [Problem(id=f"{split}-{i}", prompt=f"{'abcde'[i]}?", answer="") for i in range(5)]

    def grade(self, problem: Problem, text: str) -> Grade:
        found = any(c in "0123456789" for c in text)
        return Grade(correct=found, well_formed=found)

    def demonstration(self, problem: Problem, style: str) -> str:
        return "7" if style == "direct" else "so 7"


def output(prompt: list[int], answer: list[int], logprobs: list[float], text: str = "") -> Output:
    return Output(
        request_id=0, prompt_token_ids=prompt, token_ids=answer, logprobs=logprobs, text=text, finish_reason="stop"
    )
