"""How far a run is: a bar in a terminal that has tqdm, else a line every ten seconds."""

import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from train_gpt import Hooks, Run, rank

PAUSE = 10  # seconds between two lines


class Progress(Hooks):
    """Shows the share of a stage that is done and the seconds that are left of it."""

    def __init__(self) -> None:
        self.stage, self.done = "", 0.0
        self.first = self.start = 0.0  # what was done when the stage was first heard of; when that was
        self.last = 0.0  # when a line was last logged
        self.bar: Any = None
        self.make_bar: Any = None
        if all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr)):
            with suppress(ImportError):
                self.make_bar = import_module("tqdm").tqdm

    def on_start(self, run: Run) -> None:
        """Keep the run, which has the log."""
        self.run = run

    def on_progress(self, stage: str, done: float) -> None:
        """Show it, on rank 0."""
        if rank() != 0:
            return
        now = time.perf_counter()
        if stage != self.stage or done < self.done:
            self.close()
            self.stage, self.start, self.last, self.first = stage, now, now, done
            if self.make_bar:
                look = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
                self.bar = self.make_bar(total=1, desc=stage, leave=False, file=sys.stderr, bar_format=look)
        self.done = done
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now > self.last + PAUSE and done > self.first:
            self.last = now
            left = (now - self.start) * (1 - done) / (done - self.first)
            line = "progress: {stage} {done:.0%}, {left:.0f} s left"
            self.run.log.event("progress", line, stage=stage, done=done, left=left)
        if done >= 1:
            self.close()

    def on_event(self, name: str, values: dict[str, Any]) -> None:
        """Make room for a line; the next report shows the bar again."""
        if self.bar is not None:
            self.bar.clear()

    def close(self) -> None:
        """Take the bar away; what comes next is another stage."""
        if self.bar is not None:
            self.bar.close()
        self.stage, self.bar = "", None

    def on_end(self) -> None:
        """Take the bar away."""
        self.close()

    def on_stopped(self) -> None:
        """Take the bar away."""
        self.close()

    def on_error(self, error: BaseException) -> None:
        """Take the bar away."""
        self.close()
