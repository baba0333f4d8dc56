"""A watch over the ranks of a run: none is left waiting for another that has failed, died or is frozen."""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from train_gpt import Hooks, Run, rank, world_size

LOST_RANK = 3  # exit status of a rank that ends because of another one


class Watch(Hooks):
    """Ends this process within 60 s when another rank fails, dies or is frozen, or the launcher has gone.

    Its last line names that rank. On a thread, each rank counts up its key in the group's store every second
    and reads the others'.
    """

    SILENCE = 45.0  # seconds after which a rank that says nothing counts as lost

    def __init__(self) -> None:
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.ended = threading.Event()
        self.store: dist.Store | None = None
        self.thread: threading.Thread | None = None

    def on_start(self, run: Run) -> None:
        """Begin to watch, by a connection of its own, since the main thread may block on another."""
        self.rank, self.world = rank(), world_size()
        self.store = self.connect(20)
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def connect(self, seconds: float) -> dist.Store:
        """Returns a connection to the group's store, on which nothing takes longer. Raises RuntimeError."""
        address, port, limit = (
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timedelta(0, seconds),
        )
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)

    def key(self, name: object) -> str:
        """Returns the name of a key in the store."""
        return f"watch/{self.attempt}/{name}"

    def look(self) -> None:
        """Watch until the run ends."""
        pause, last = min(1.0, self.SILENCE / 10), time.monotonic()
        self.seen = {other: (0, last) for other in range(self.world) if other != self.rank}
        try:
            while not self.ended.wait(pause):
                slept = time.monotonic() > last + 5 * pause  # as all do if their container is paused
                if slept:
                    self.seen = {other: (beats, time.monotonic()) for other, (beats, _) in self.seen.items()}
                last = time.monotonic()
                try:
                    why = self.beat(self.store, last)
                except (RuntimeError, OSError):
                    if not slept and time.monotonic() < last + 5 * pause:
                        raise
                    self.store, why = self.connect(5), ""
                if why:
                    # rank 0, which may have the store, waits for longer
                    return self.stop(why, self.SILENCE / 15 * (1 if self.rank else 2))
        except (RuntimeError, OSError):
            self.stop("the process that started the ranks, or rank 0, has gone", self.SILENCE / 15)

    def beat(self, store: dist.Store, begin: float) -> str:
        """Give a sign of life, look for the others', and return why all have to end, if they have to.

        Silence lasts to the `begin` of this look: what this process sleeps in it is no silence of others.
        """
        store.add(self.key(self.rank), 1)
        for other, (beats, since) in self.seen.items():
            now = store.add(self.key(other), 0)
            if now != beats:
                self.seen[other] = now, time.monotonic()
            elif begin > since + self.SILENCE:
                silence = f"{self.SILENCE:.0f} s"
                self.tell(store, f"rank {other} has been silent for {silence}: it died or is frozen")
        failed = self.key("failed")
        return store.get(failed).decode() if store.check([failed]) else ""

    def stop(self, why: str, seconds: float) -> None:
        """End this process, unless it ends by itself in time, of the same error or because all is done."""
        if not self.ended.wait(seconds):
            print(f"train_gpt.py: rank {self.rank}: error: stopped, since {why}", file=sys.stderr, flush=True)
            os._exit(LOST_RANK)  # the main thread may wait for ever

    def tell(self, store: dist.Store, why: str) -> None:
        """Tell all ranks why they have to end; what the first one tells is kept."""
        if not store.check([self.key("failed")]):
            store.set(self.key("failed"), why)

    def end(self, why: str = "") -> None:
        """End the watch; tell the others why, if they have to end, too. A second call does nothing.

        A thread that is left when Python ends would take the process down.
        """
        self.ended.set()
        if self.thread is not None and self.store is not None:
            self.thread.join()
            with suppress(RuntimeError, OSError):
                if why:
                    self.tell(self.store, why)
        self.thread = self.store = None

    def on_end(self) -> None:
        """End the watch: all is done."""
        self.end()

    def on_stopped(self) -> None:
        """End the watch and the others' runs."""
        self.end(f"rank {rank()} was stopped")

    def on_error(self, error: BaseException) -> None:
        """Tell the others that this rank fails; if for want of another, wait until that one is named."""
        lost_another = isinstance(error, dist.DistError) or "gloo" in str(error)
        if lost_another and self.thread is not None:
            time.sleep(self.SILENCE + 10)
        self.end(f"rank {rank()} failed: {error}".split("\n")[0])
