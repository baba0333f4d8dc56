"""One run at a time has a RUN_ID, and what older runs of that name left is kept."""

import fcntl
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import IO, Any

from train_gpt import Hooks, Run, RunError, rank, together

# Of a run's files; the program itself gives an older log its second name
SUFFIXES = (".txt", ".jsonl", ".bin", ".audit.json", ".ckpt", ".ckpt.previous")
LOG, OLD_LOG = ".txt", ".txt.previous"


def keep_old_files(log_path: Path) -> None:
    """Give what an older run left under this name the next free number: RUN_ID.1.txt. Raises OSError."""
    for number in count(1):
        kept = {suffix: log_path.with_suffix(f".{number}{suffix}") for suffix in SUFFIXES}
        if not any(path.exists() for path in kept.values()):
            break
    for suffix, path in kept.items():
        old = log_path.with_suffix(OLD_LOG if suffix == LOG else suffix)
        if old.exists():
            os.replace(old, path)


class Ownership(Hooks):
    """Locks logs/RUN_ID.lock while the run lives, and numbers older files once its inputs are good.

    The system lets go of the lock when the process dies. A run that goes on, as `phase()` says, keeps its
    files.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        self.phase = phase
        self.file: IO[str] | None = None  # of rank 0
        self.begun = False  # a line was logged

    def on_start(self, run: Run) -> None:
        """Take the lock. Raises RunError if another run has it."""
        self.run = run
        together(self.check_folders, 1)
        together(self.lock, 1)

    def check_folders(self) -> None:
        """Raises RunError, OSError if what the run is to write cannot be written."""
        run = self.run
        for path in [run.log_path] if run.settings.eval_only else [run.artifact_path, run.log_path]:
            os.makedirs(path.parent, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise RunError(f"{path} cannot be written")

    def lock(self) -> None:
        """Take the lock. Raises RunError, OSError."""
        path = self.run.log_path.with_suffix(".lock")
        path.parent.mkdir(exist_ok=True)
        while True:
            file = open(path, "w")  # noqa: SIM115 (until the run ends)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                name = self.run.settings.run_id
                raise RunError(f"RUN_ID={name}: another run has it; give another") from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                self.file = file
                return  # else its last owner has just removed it

    def on_event(self, name: str, values: dict[str, Any]) -> None:
        """Move older files away when the first line is logged: inputs are good by then."""
        if not self.begun and not self.phase():
            keep_old_files(self.run.log_path)
        self.begun = True

    def release(self) -> None:
        """Let go of the lock."""
        if rank() == 0 and self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def on_end(self) -> None:
        """Let go of the lock."""
        self.release()

    def on_stopped(self) -> None:
        """Let go of the lock."""
        self.release()

    def on_error(self, error: BaseException) -> None:
        """Let go of the lock."""
        self.release()
