"""Python programs that cannot hang for ever and leave nothing running."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def end_group(process: subprocess.Popen) -> None:
    """Kill a process and those it has started, if any still run."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def started(
    words: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str],
    seconds: float,
    errors: IO[str] | None = None,
) -> Iterator[subprocess.Popen]:
    """Start `python WORDS` in a folder, its lines in a pipe; kill it after so many seconds.

    The block reads the lines, then it waits for the process; whatever ends it ends what was started.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        process_group=0,
    )
    timer = threading.Timer(seconds, end_group, [process])
    timer.start()
    try:
        yield process
        process.wait()
    finally:
        timer.cancel()
        end_group(process)
        process.communicate()
