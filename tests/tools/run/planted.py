"""train_gpt.py with a fault in it, to test what a run survives and how it ends.

    python -m tests.tools.run.planted NAME [VALUE]

A fault is a hook beside the run's own; only that it is there is patched in.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import train_gpt as T
from tools.run import HookGroup
from tools.run.watch import Watch

AT = 6  # the step of training, or update of TTT, before which a fault strikes
SHARD = Path("data/fineweb_train_000000.bin")


class Fault(T.Hooks):
    """Strikes once, at a place: calls `strike(what the hook there is given first)`."""

    def __init__(self, place, strike):
        self.place, self.strike, self.updates = place, strike, 0

    def at(self, place, argument=None):
        if place == self.place:
            self.place = None
            self.strike(argument)

    def on_step(self, trainer, last):
        if trainer.done == AT - 1:
            self.at("step", trainer)

    def before_update(self, learner):
        self.updates += 1
        if self.updates == AT:
            self.at("update", learner)

    def on_progress(self, stage, done):
        self.at(stage)

    def on_event(self, name, values):
        self.at(f"event {name}")


def on_last_rank(fault):
    """Strike there only; the others wait 5 seconds for a silent one."""
    Watch.SILENCE = 5
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    return Fault("step" if last else None, fault)


def between_reads(fault):
    """Strike when the loader rests: what shrinks between the look at its size and the read ends in SIGBUS."""

    def strike(trainer):
        time.sleep(0.3)
        fault()

    return Fault("step", strike)


def fail(trainer):
    raise ValueError("a planted fault")


def spoil_gradient(name):
    """From the step AT on, NaN in a gradient."""

    def strike(trainer):
        parameter = dict(trainer.model.named_parameters())[name]
        parameter.register_hook(lambda grad: grad * torch.nan)

    return Fault("step", strike)


def send(name):
    """A fault that sends this process a signal."""
    return lambda _: os.kill(os.getpid(), name)


def limit_files(size):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    return T.Hooks()


FAULTS = {
    "raise": lambda: on_last_rank(fail),
    "kill": lambda: on_last_rank(send(signal.SIGKILL)),
    "freeze": lambda: on_last_rank(send(signal.SIGSTOP)),
    "sigterm": lambda: Fault("step", send(signal.SIGTERM)),
    "sigterm on one rank": lambda: on_last_rank(
        send(signal.SIGTERM)
    ),  # when the ranks have just agreed to go on
    "sigterm in TTT": lambda: Fault("update", send(signal.SIGTERM)),
    "sigterm in warm-up": lambda: Fault("warm-up", send(signal.SIGTERM)),
    "sigterm after training": lambda: Fault("event trained", send(signal.SIGTERM)),
    "sigterm before export": lambda: Fault("quantizing and coding", send(signal.SIGTERM)),
    "sigterm in export": lambda: Fault("event quantized", send(signal.SIGTERM)),
    "vanish": lambda: between_reads(SHARD.unlink),
    "shrink": lambda: between_reads(lambda: os.truncate(SHARD, 2000)),
    "change": lambda: between_reads(lambda: SHARD.write_bytes(SHARD.read_bytes()[::-1])),
    "spoil": spoil_gradient,
    "limit": limit_files,
    "none": T.Hooks,
    "watched": lambda: on_last_rank(lambda _: None),
}


def main():
    fault, load_hooks = FAULTS[sys.argv.pop(1)](*(sys.argv.pop() for _ in sys.argv[1:])), T.load_hooks
    T.load_hooks = lambda s: HookGroup([load_hooks(s), fault])
    return T.main()


if __name__ == "__main__":
    sys.exit(main())
