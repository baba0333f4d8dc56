"""Runs of train_gpt.py, or of it with a planted fault, on one or several processes."""

from tests import tiny
from tests.forked import Process

PLANTED = "tests.tools.run.planted"


def start(folder, *words, world=1, **settings):
    """The ranks of a run of train_gpt.py or, with words, of planted.py."""
    command = ["-m", PLANTED, *words] if words else [tiny.SCRIPT]
    group = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=tiny.free_port()) if world > 1 else {}
    return [
        Process(
            command,
            folder,
            tiny.environment(group | settings | (dict(RANK=rank, LOCAL_RANK=rank) if group else {})),
        )
        for rank in range(world)
    ]


def finish(processes):
    return tiny.finish(processes, 120)[0]
