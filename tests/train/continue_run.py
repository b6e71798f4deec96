"""A new process that continues a run to its end: `python continue_run.py FOLDER`. Prints its digest and losses."""

import json
import sys
from pathlib import Path

import torch
from test_resume import continued
from training_example import digest, logged

if __name__ == "__main__":
    torch.set_num_threads(1)
    ended = continued(Path(sys.argv[1]))
    print(json.dumps({"digest": digest(ended), "losses": [row["loss"] for row in logged(ended)]}))
