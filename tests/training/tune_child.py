"""Child process that fits with a checkpoint, prunes and fits again, and can kill itself after a given step."""

import os
import signal
import sys
from pathlib import Path

import tiny_bert

from fedspine_edge import EdgeTuner


def main() -> None:
    folder, work, kill_fit, kill_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tuner = EdgeTuner.from_pretrained(folder, r=2, learning_rate=1e-2, torch_device="cpu")
    data = tiny_bert.sentences(60)
    for number in (1, 2):

        def on_step(step: int, loss: float | None, number: int = number) -> None:
            print(number, step, flush=True)
            if (number, step) == (kill_fit, kill_step):
                os.kill(os.getpid(), signal.SIGKILL)

        tuner.fit(data, steps=25, checkpoint=work / f"fit-{number}", on_step=on_step)
        if number == 1:
            tuner.prune(0.4, stages=2, steps=3)
    tuner.save(work / "out")


if __name__ == "__main__":
    main()
