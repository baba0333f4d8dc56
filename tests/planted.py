"""train_gpt.py with a fault in it: `planted.py NAME [VALUE]`, for the tests of what a run survives and how it ends."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import torch  # noqa: E402
import train_gpt as T  # noqa: E402

import tools.extras  # noqa: E402

AT = 6  # the step of training at which a fault strikes
SHARD = Path("data/fineweb_train_000000.bin")


def strike(fault, owner=T.Trainer, name="step", at=AT):
    """Call fault(first argument) before the step `at`, after a warm-up of one step; or before a call of another function."""
    function, calls = getattr(owner, name), 0

    def faulty(*args):
        nonlocal calls
        calls += 1
        if calls == at + 1:
            fault(args[0])
        return function(*args)

    setattr(owner, name, faulty)


def on_last_rank(fault):
    """Only the last rank strikes; the others wait 5 seconds for a silent one."""
    tools.extras.SILENCE = 5
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    strike(fault if last else lambda trainer: None)


def between_reads(fault):
    """What shrinks between the look at its size and the read, microseconds later, ends a process by SIGBUS."""
    strike(lambda trainer: (time.sleep(0.3), fault()))


def fail(trainer):
    raise ValueError("a planted fault")


def spoil_gradient(name):
    """From the step AT on, NaN in a gradient."""
    parameter = lambda trainer: dict(trainer.model.named_parameters())[name]
    strike(lambda trainer: parameter(trainer).register_hook(lambda grad: grad * torch.nan))


def terminate(_):
    os.kill(os.getpid(), signal.SIGTERM)


def limit_files(size):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FAULTS = {
    "raise": lambda: on_last_rank(fail),
    "kill": lambda: on_last_rank(lambda trainer: os.kill(os.getpid(), signal.SIGKILL)),
    "freeze": lambda: on_last_rank(lambda trainer: os.kill(os.getpid(), signal.SIGSTOP)),
    "sigterm": lambda: strike(terminate),
    "sigterm in TTT": lambda: strike(terminate, T.Learner, "update"),
    "sigterm in warm-up": lambda: strike(terminate, T.Trainer, "warm_up", 0),
    "sigterm in choice": lambda: strike(terminate, T.Trainer, "choose", 0),
    "sigterm in export": lambda: strike(terminate, T, "pack_artifact", 0),
    "vanish": lambda: between_reads(SHARD.unlink),
    "shrink": lambda: between_reads(lambda: os.truncate(SHARD, 2000)),
    "change": lambda: between_reads(lambda: SHARD.write_bytes(SHARD.read_bytes()[::-1])),
    "spoil": spoil_gradient,
    "limit": lambda size: limit_files(int(size)),
    "none": lambda: None,
    "other source": lambda: setattr(T, "__file__", __file__),
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)](*(sys.argv.pop() for _ in sys.argv[1:]))
    sys.exit(T.main())
