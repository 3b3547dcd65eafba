"""Label-sorted tables for the tests of this room."""

import numpy as np

from capstan.shuffling import Training, train
from capstan.storage import NumpyBlocks


def sorted_table(num_rows=4000, classes=2, seed=0):
    """Five features of which a label depends on three, rows sorted by label."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, 5)) * [1, 2, 3, 4, 5] + [0, 1, 2, 3, 4]
    scores = (x[:, :3] - [0, 1, 2]) / [1, 2, 3] @ rng.normal(size=(3, classes))
    y = (scores + rng.normal(size=scores.shape)).argmax(axis=1)
    order = np.argsort(y, kind="stable")
    return {f"f{at}": x[order, at] for at in range(5)} | {"y": y[order]}


def kill_itself_at(folder, epoch, step):
    """Train with a checkpoint after every step, and die at one."""
    import os
    import signal
    from pathlib import Path

    def on_step(at_epoch, at_step):
        if (at_epoch, at_step) == (epoch, step):
            os.kill(os.getpid(), signal.SIGKILL)

    train(*run_of_test(), checkpoint=Path(folder) / "state.npz", checkpoint_every_s=0.0, on_step=on_step)


def run_of_test():
    """A source and a training that the parent and the killed process share."""
    source = NumpyBlocks(sorted_table(800), rows_per_block=16)
    return source, Training(label="y", model="svm", buffer_blocks=5, epochs=3, seed=4)
