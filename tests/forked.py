"""Python programs as forks of one process that has imported PyTorch, which costs each of its own two seconds.

What is imported before are libraries; the project's own code is imported, or run as a script, in the fork.
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
    """Run `python command`, a script or `-m` and a module, its stdout and stderr in two files.

    The module search path is that of a new process.
    """
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module = command[0] == "-m"  # as if the project's root were in PYTHONPATH
    first = str(ROOT) if module else str(Path(command[0]).parent)
    sys.path[:] = [first, *(path for path in sys.path if path != str(ROOT))]
    sys.argv[:] = command[1:] if module else command
    if module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


class Process:
    """`python command` in a folder, started at once; of subprocess.Popen's form as far as it is needed."""

    def __init__(self, command, folder, environment):
        self.outputs = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115 (until read)
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
        """What it wrote on stdout and on stderr once it has ended; TimeoutExpired after so many seconds."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return [Path(file.name).read_text("utf-8") for file in self.outputs]
