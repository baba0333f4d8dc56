"""Python programs as forks of one process that has imported PyTorch, which costs each program of its own some two seconds.

What is imported in advance are libraries; the project's own code is imported, or run as a script, in the fork.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context(
    "forkserver"
)  # its server is clean of what the tests do to this process
CONTEXT.set_forkserver_preload(["pytest", "sentencepiece", "torch._dynamo"])


def become(command, folder, environment, *outputs):
    """Run `python command`, its stdout and stderr in two files, with the module search path of a new process."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    ours = {str(ROOT / name) for name in ("", "tools", "tests")}
    sys.path[:] = [str(Path(command[0]).parent), *(path for path in sys.path if path not in ours)]
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


class Process:
    """`python command` in a folder, started at once; of subprocess.Popen's form as far as it is needed."""

    def __init__(self, command, folder, environment):
        self.outputs = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        arguments = (
            [str(word) for word in command],
            str(folder),
            environment,
            *(file.name for file in self.outputs),
        )
        self.process = CONTEXT.Process(target=become, args=arguments, daemon=True)
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def communicate(self, timeout=None):
        """What it wrote on stdout and on stderr, once it has ended; TimeoutExpired if that takes too long (seconds)."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return [Path(file.name).read_text("utf-8") for file in self.outputs]
