"""The events of a run as JSON, one object a line: logs/RUN_ID.jsonl. docs/events.md lists them."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train_gpt import FIELDS, Hooks, Run, rank, show, world_size


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last end of a line, if there is such a file. Raises OSError."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def has_result(log_path: Path) -> bool:
    """Returns whether the last run of a log's name came to its end. Raises OSError."""
    path = log_path.with_suffix(".jsonl")
    return path.exists() and b'{"event": "finished"' in path.read_bytes()


class Events(Hooks):
    """Writes for each event its name, `time` (seconds since this was made) and its own values.

    A run that goes on, as `phase()` says, appends to its file. A full disk costs the events, not the run,
    which says so in the end.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        self.phase, self.start = phase, time.perf_counter()
        self.path: Path | None = None  # once there is something to write
        self.full = False

    def on_start(self, run: Run) -> None:
        """Keep the run, whose name is known now, and which GPUs all ranks have."""
        self.run = run
        own = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
        self.devices = [own] * world_size()
        if world_size() > 1:
            dist.all_gather_object(self.devices, own)

    def prepare(self) -> Path:
        """Prepare for the first event and return the file's path. Raises OSError."""
        path = self.run.log_path.with_suffix(".jsonl")
        if self.phase():
            drop_torn_line(path)
        return path

    def on_event(self, name: str, values: dict[str, Any]) -> None:
        """Write an event."""
        if self.full:
            return
        if name == "settings":
            s = self.run.settings
            texts = {name: show(getattr(s, name.lower())) for name in FIELDS}
            changed = [name for name, f in FIELDS.items() if texts[name] != show(f.default)]
            values = values | {"settings": texts, "changed": changed}
        if name == "machine" and len(set(self.devices)) > 1:
            values = values | {"hardware": " + ".join(self.devices)}
        line = json.dumps({"event": name, "time": round(time.perf_counter() - self.start, 3)} | values)
        try:
            self.path = self.path or self.prepare()
            with open(self.path, "a", encoding="utf-8") as file:
                print(line, file=file)
        except OSError as e:
            self.full = True
            self.run.log.lost = self.run.log.lost or str(e)

    def on_end(self) -> None:
        """Write that the result is there."""
        if rank() == 0:
            self.on_event("finished", {})

    def on_error(self, error: BaseException) -> None:
        """Write why the run ends, if it had begun to write."""
        if self.path and rank() == 0:
            self.on_event("error", {"message": str(error)})
