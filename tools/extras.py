"""What a run of train_gpt.py does beside its work, where this folder lies beside it: JSON events, progress, checkpoints, the
audit, and a watch over the ranks. train_gpt.py says by notify() where it is; nothing here changes what it computes.

logs/RUN_ID.jsonl gets a JSON object a line: `event` (its name), `time` (seconds since the start) and the event's own values;
README.md lists them.
"""

import hashlib
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

SILENCE = 45  # seconds after which a rank that says nothing counts as lost
LOST_RANK = 3  # exit status of a rank that ends because of another one


def peak_memory() -> float:
    """This process's, in MiB, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last end of a line. Raises OSError."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


class Progress:
    """How far a stage is: a bar in a terminal that has tqdm, else a line every 10 seconds."""

    def __init__(self) -> None:
        self.stage, self.bar, self.bars = None, None, None
        if sys.stdout.isatty() and sys.stderr.isatty():
            try:
                self.bars = import_module("tqdm").tqdm
            except ImportError:
                pass

    def report(self, program: ModuleType, stage: str, done: float) -> None:
        """`done`: the share of the stage that is done, from 0 to 1."""
        now = time.perf_counter()
        if stage != self.stage or done < self.done:
            self.close()
            self.stage, self.start, self.last, self.first = stage, now, now, done
            self.bar = self.bars and self.bars(
                total=1,
                desc=stage,
                leave=False,
                file=sys.stderr,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            )
        self.done = done
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now > self.last + 10 and done > self.first:
            self.last = now
            left = (now - self.start) * (1 - done) / (done - self.first)
            program.log(
                "progress",
                "progress: {stage} {done:.0%}, {left:.0f} s left",
                stage=stage,
                done=done,
                left=left,
            )
        if done >= 1:
            self.close()

    def clear(self) -> None:
        """Make room for a line; the next report shows the bar again."""
        if self.bar is not None:
            self.bar.clear()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.stage = self.bar = None


class Watch:
    """Ends this process within 60 seconds, with a line that names the rank, when another rank fails, dies or is frozen, or when
    the launcher has gone. On a thread: every second each rank counts up its key in the group's store and reads the others'."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.attempt = rank, world, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store, self.ended = self.connect(), threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def connect(self) -> dist.TCPStore:
        """A connection of its own: the main thread may block on another."""
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=20),
        )

    def key(self, name: object) -> str:
        return f"watch/{self.attempt}/{name}"

    def look(self) -> None:
        seen, pause = {rank: (0, time.monotonic()) for rank in range(self.world)}, min(1, SILENCE / 10)
        try:
            while not self.ended.wait(pause):
                self.store.add(self.key(self.rank), 1)
                for rank, (beats, since) in seen.items():
                    now = self.store.add(self.key(rank), 0)
                    if now != beats:
                        seen[rank] = now, time.monotonic()
                    elif time.monotonic() > since + SILENCE:
                        self.tell(f"rank {rank} has been silent for {SILENCE} s: it died or is frozen")
                if self.store.check([self.key("failed")]):
                    why = self.store.get(self.key("failed")).decode()
                    return self.stop(why, SILENCE / 15 * (1 if self.rank else 2))  # rank 0 may have the store
        except (RuntimeError, OSError):
            self.stop("the process that started the ranks, or rank 0, has gone", SILENCE / 15)

    def stop(self, why: str, seconds: float) -> None:
        """Unless this process ends by itself within that time, of the same error or because all is done."""
        if not self.ended.wait(seconds):
            print(f"train_gpt.py: rank {self.rank}: error: stopped, since {why}", file=sys.stderr, flush=True)
            os._exit(LOST_RANK)

    def tell(self, why: str) -> None:
        """All ranks; what the first one tells is kept."""
        if not self.store.check([self.key("failed")]):
            self.store.set(self.key("failed"), why)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails; if it does so for want of another, wait until that one is named."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            time.sleep(SILENCE + 10)
        self.end(f"rank {self.rank} failed: {error}".split("\n")[0])

    def end(self, why: str = "") -> None:
        """Tell the others why, if they have to end, too. A thread that is left when Python ends would take the process down."""
        self.ended.set()
        self.thread.join()
        with suppress(RuntimeError, OSError):
            if why:
                self.tell(why)


class Extras:
    """A run's. Each method is what notify() of that name does."""

    def __init__(self) -> None:
        self.file = self.keeper = self.auditor = self.watch = self.program = self.learner = None
        self.begun = self.full = self.sampled = False
        self.stamps = {}
        self.clock = self.last = time.perf_counter()

    def start(self, s: Any, program: ModuleType) -> str:
        """Before the log is opened. "training" or "scoring" if the run goes on from a checkpoint, else "". Raises RunError."""
        if self.file:
            self.file.close()
        self.__init__()
        self.program, self.s, self.bar = program, s, Progress()
        if program.world_size() > 1:
            self.watch = Watch(program.rank(), program.world_size())
        if s.checkpoint_every or s.resume:
            self.keeper = import_module("tools.checkpoint").Keeper(program, s, self.watch)
        self.resumed = self.keeper.state.get("phase", "") if self.keeper else ""
        if s.audit:
            self.auditor = import_module("tools.audit").Audit(program, s, self.resumed)
        if self.resumed and program.rank() == 0:
            for suffix in ("txt", "jsonl"):
                drop_torn_line(Path(f"logs/{s.run_id}.{suffix}"))
        return self.resumed

    def settings(self, s: Any) -> None:
        """Those that hold, an artifact's included."""
        s.run_id = s.run_id or self.s.run_id
        self.s, own = s, torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.devices = [own] * self.program.world_size()
        if self.watch:
            dist.all_gather_object(self.devices, own)

    def event(self, name: str, values: dict) -> str:
        """On rank 0: add to the values what only this folder knows, write them, return what to add to the line."""
        if not self.program or name == "took":  # that is in `stage`, too
            return ""
        self.bar.clear()
        more = getattr(self, f"add_to_{name}", lambda values: None)(values) or ""
        if self.full:
            return more
        try:
            if not self.file:
                path = Path(f"logs/{self.s.run_id}.jsonl")
                if path.exists() and not self.resumed:
                    os.replace(path, f"{path}.previous")
                self.file = open(path, "a", encoding="utf-8")
            self.last = time.perf_counter()
            seconds = round(self.last - self.clock, 3)
            print(json.dumps({"event": name, "time": seconds} | values), file=self.file, flush=True)
        except OSError as e:
            self.program.lost.append(str(e))
            self.full = True
        return more

    def add_to_settings(self, values: dict) -> None:
        fields, source = self.program.FIELDS, Path(self.program.__file__).read_bytes()
        values["settings"] = {name: self.program.show(getattr(self.s, name.lower())) for name in fields}
        values["changed"] = [name for name, f in fields.items() if getattr(self.s, name.lower()) != f.default]
        values |= {"source_sha256": hashlib.sha256(source).hexdigest(), "code_bytes": len(source)}

    def add_to_step(self, values: dict) -> str:
        """Tokens per second since the start of training, the peak of memory, the seconds left of training."""
        s, elapsed = self.s, values["train_time"] / 1000
        left = (s.iterations - values["step"]) * values["step_avg"] / 1000
        if s.max_wallclock_seconds:
            left = min(left, max(s.max_wallclock_seconds - elapsed, 0))
        values |= {
            "tokens_per_second": s.train_batch_tokens * values["step"] / elapsed,
            "memory": peak_memory(),
            "left": left,
        }
        return " tokens/s:{tokens_per_second:.0f} memory:{memory:.0f}MiB left:{left:.0f}s".format_map(values)

    def add_to_machine(self, values: dict) -> None:
        values |= {"torch": torch.__version__, "python": platform.python_version()}
        if len({*self.devices}) > 1:
            values["hardware"] = " + ".join(self.devices)

    def add_to_trained(self, values: dict) -> None:
        values["memory"] = peak_memory()

    def add_to_quantized(self, values: dict) -> None:
        """Seconds since the event before."""
        values["took"] = time.perf_counter() - self.last

    add_to_compiled = add_to_warm_up = add_to_quantized

    def add_to_size(self, values: dict) -> None:
        """How the artifact's bytes are shared out: its xz stream, the rest is the code of the integers."""
        with open(self.s.artifact_path or f"logs/{self.s.run_id}.bin", "rb") as file:
            values["side_bytes"] = 44 + int.from_bytes(file.read(44)[40:], "little")

    def add_to_stage(self, values: dict) -> None:
        values |= {"eval_time": self.eval_time, "memory": peak_memory()}

    def progress(self, stage: str, done: float) -> None:
        if stage in ("roundtrip", "sliding", "streaming", "TTT") and not self.begun:
            stage = "compilation"
        if self.program and stage and self.program.rank() == 0:
            self.bar.report(self.program, stage, done)
        if self.keeper and stage:
            self.keeper.progress()

    def shard(self, path: Path | str | None) -> None:
        """Before a shard is read. Raises RunError if its file has changed since the run began, OSError if it has gone."""
        if path and self.program:
            path, status = os.path.abspath(path), os.stat(path)
            stamp = status.st_size, status.st_mtime_ns
            if self.stamps.setdefault(path, stamp) != stamp:
                raise self.program.RunError(f"shard {os.path.relpath(path)} was changed during the run")

    def resume(self, trainer: Any, averages: Any) -> tuple[int, float] | None:
        """(step, seconds of training so far), with everything as it then was."""
        found = self.keeper and self.keeper.resume(trainer, averages)
        self.sampled = averages.samples > 0
        return found

    def step(self, trainer: Any, averages: Any, step: int, elapsed: float, last: bool) -> None:
        """`step` steps are done, in `elapsed` seconds; perhaps the last one."""
        if self.program and averages.samples and not self.sampled:
            self.sampled = True
            self.program.log("swa", step=step - 1)
        if self.keeper:
            self.keeper.step(trainer, averages, step, elapsed, last)

    def not_finite(self, optimizers: Any, loss: float) -> str:
        """The first tensor that is so: the loss or, by its name, a gradient. All ranks ask."""
        names = {id(p): name for name, p in optimizers.model.named_parameters()}
        params = optimizers.banks + [p for group in optimizers.adamw.param_groups for p in group["params"]]
        if not self.program:
            return ""
        finite = self.program.all_reduce(optimizers.norms.clone()).isfinite().tolist()
        if not math.isfinite(loss):
            return ", first in the loss"
        return next(
            (f", first in the gradient of {names[id(p)]}" for p, good in zip(params, finite) if not good), ""
        )

    def scoring(self, artifact: Path, tokenizer: Any) -> float:
        """Scoring begins; the seconds it took before the run was resumed."""
        self.begun = True
        if self.auditor:
            self.auditor.begin(artifact, tokenizer)
        return self.keeper.begin_scoring(artifact) if self.keeper else 0.0

    def scored(self, stage: str) -> Any:
        """A stage begins; what it has given before the run was resumed."""
        self.began = time.perf_counter()
        return self.keeper and self.keeper.scores.get(stage)

    def stage(self, name: str, score: Any) -> None:
        """A stage has its score. Raises RunError if that is no number."""
        if self.program and not math.isfinite(score.nats):
            weights = self.learner.model.named_parameters() if self.learner else ()
            where = next((f", first in {weight}" for weight, w in weights if not w.isfinite().all()), "")
            raise self.program.RunError(
                f"{name}: the loss is {score.nats}{where}; lower TTT_LR or the learning rates"
            )
        if self.auditor and self.begun:
            self.auditor.stage(name, score)
        if self.program:
            self.eval_time = 1000 * (
                time.perf_counter() - self.began + (self.keeper.spent(name) if self.keeper else 0)
            )
            self.program.log(
                "took",
                "{stage} eval_time:{ms:.0f}ms, peak memory {memory:.0f} MiB",
                stage=name,
                ms=self.eval_time,
                memory=peak_memory(),
            )
        if self.keeper:
            self.keeper.stage(name, score)
        if name == "averaged":
            self.progress("quantizing and coding", 0)

    def resume_ttt(self, learner: Any) -> list | None:
        """The records of the chunks done, with the learner as it then was."""
        return self.keeper.resume_ttt(learner) if self.keeper and self.begun else None

    def chunk(self, learner: Any, records: list) -> None:
        self.learner = learner
        if self.keeper and self.begun:
            self.keeper.chunk(learner, records)

    def end(self) -> None:
        if self.auditor:
            found = self.auditor.end()
            self.program.log("audit", violations=len(found["violations"]), share=found["share"])
            if found["violations"]:
                raise self.program.RunError("audit: " + "; ".join(found["violations"]))
        if self.keeper:
            self.keeper.end()
        if self.watch:
            self.watch.end()

    def failed(self, error: BaseException) -> None:
        if self.file:
            self.bar.close()
            self.event("error", {"message": str(error)})
        if self.keeper and self.keeper.terminated:
            self.keeper.stop()  # the others stop, too, which is the error
        if self.keeper:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing can be saved any more
        if self.watch:
            self.watch.fail(error)


extras = Extras()


def notify(what: str, *args: Any) -> Any:
    """What the run wants to know or has done; see Extras."""
    return getattr(extras, what)(*args)
