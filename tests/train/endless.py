"""A run that only a signal ends: `python endless.py FOLDER [stuck]`. Exits as the command line does.

`stuck`: the third step never returns.
"""

import sys
import time
from pathlib import Path

import torch
from training_example import Factored, Stream, digest, settings, trainer

from benthic.base.errors import Interrupted
from benthic.base.signals import Stop


class Announced(Factored):
    """Says when a step begins."""

    steps = 0

    def __call__(self, model, batch, targets):
        self.steps += 1
        print(self.steps, flush=True)
        if self.steps == 3 and sys.argv[2:] == ["stuck"]:
            time.sleep(600)
        return super().__call__(model, batch, targets)


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, stop = settings(max_steps=10**6, save_steps=10**6), Stop()
    stop.install()
    subject = trainer(Path(sys.argv[1]), config, objective=Announced(config), cursor=Stream(), stop=stop)
    try:
        subject.fit(subject.cursor)  # type: ignore[arg-type]
    except Interrupted as error:
        print(digest(subject), error, flush=True)
        sys.exit(error.exit_code)
