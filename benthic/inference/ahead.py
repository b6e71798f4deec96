"""The end of a step on a GPU: from what rows have chosen to the drafts of the next step.

The prediction module is one block, so its latents at a token follow from the main model's hidden state there and the
token after it: `Fused.mtp_fill` writes those of all tokens of the step without attention and experts. They are needed
for one token of each row only, the last one that is right; from there on the row drafts, a token at a time, as a decode
row of one query (speculative.py). Everything here may stand in a CUDA graph.

Letters: B rows, Q queries, W pages per row, N tokens of the step, d hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from benthic.inference import sampler
from benthic.inference.controls import Controls
from benthic.inference.fused import Decode, Fused, Tokens
from benthic.inference.quick import QUICK
from benthic.inference.sampler import Choice
from benthic.kernels import decode_inputs
from benthic.kernels.speculate import Verified


@dataclass
class Ends:
    """Rows of one kind that have chosen, and where each of them goes on. `at` counts all of the step's tokens."""

    choice: Choice
    verified: Verified
    table: Tensor  # [B, W] int32 pages
    controls: Controls | None


def draft(forward: Fused, rows: Ends, hidden: Tensor, out: Tensor, vocab_size: int) -> None:
    """hidden [N, d] of the main model -> out [B, drafts]: guesses for the tokens after the last one. The latents of the
    step's tokens are in the cache. Where a row has no page for the next ones, it is padding and its guess is bad."""
    v, count = rows.verified, out.shape[1]
    if not count:
        return
    places = decode_inputs.angles(v.positions.flatten(), forward.frequencies, forward.turn)
    cos, sin = (x.view(count, len(out), -1) for x in places)  # [drafts, B, P/2]
    state, at, guess = hidden, v.at, v.last
    for i in range(count):
        place = Decode(len(out), 1, rows.table, v.context[i])
        tokens = Tokens(v.positions[i], v.positions[i], v.slots[i], place, None)  # whose ids are not read
        state, at = forward.mtp_hidden(state, guess, tokens, 0, at, (cos[i], sin[i])), None
        chosen = sampler.propose(forward.logits(state), rows.controls, v.positions[i] + 2, vocab_size, QUICK)
        guess = out[:, i].copy_(forward.ranks.agree(chosen))
