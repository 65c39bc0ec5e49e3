"""What torchrun starts in `test_elastic.py`: a training of which the rank KILLED dies before its sixth step, once."""

import os
import signal
import sys

from fastcifar import command_line, train
from fastcifar.training.adversarial import Adversarial
from fastcifar.training.classify import Classification


def kill_before_step_six(task):
    """Has the task's process end there by SIGKILL."""
    original = task.train_step

    def train_step(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, step)

    task.train_step = train_step


if os.environ["RANK"] == os.environ["KILLED"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    kill_before_step_six(Classification)
    kill_before_step_six(Adversarial)
command_line.run("python -m fastcifar.train", train.main, sys.argv[1:])
