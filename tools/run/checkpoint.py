"""Checkpoints of a run in one file, logs/RUN_ID.ckpt, from which RESUME=path or RESUME=auto goes on.

The file: 8 bytes MAGIC, the SHA-256 of all that follows, what torch.save() made of a dict:

    made_by     source and settings, which must be the resuming run's; the number of processes need not
    phase       "training" or "scoring"
    inputs      SHA-256 of what scoring reads, in that phase
    generators  state of PyTorch's random number generators
    state       state_dict() of the Trainer or of the Evaluation. What these must keep is their own business

A file is written whole, under another name, and then takes the place of the one before, which stays as
logs/RUN_ID.ckpt.previous: should the last state already lead to numbers that are none, that one may not.
Training waits only for the copy to main memory; a thread writes.
"""

import hashlib
import io
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import train_gpt
from tools.run.events import drop_torn_line, has_result
from tools.run.watch import Watch
from train_gpt import (
    KEPT,
    Evaluation,
    Hooks,
    Run,
    RunError,
    Score,
    Stateful,
    TestTimeTraining,
    Trainer,
    all_reduce,
    from_rank0,
    open_shards,
    rank,
    show,
    together,
)

MAGIC = b"GPTCKPT2"
# What stops a run: a scheduler, Ctrl-C, a terminal that closes, Slurm's warning
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HEAD = len(MAGIC) + hashlib.sha256().digest_size  # bytes before the content
# Settings of which a run that goes on may have others
MAY_DIFFER = {"TRAIN_LOG_EVERY", "VAL_LOSS_EVERY", "MAX_WALLCLOCK_SECONDS", "EVAL_MAX_SECONDS"}


def copies_on(device: torch.device | str, value: Any) -> Any:
    """Returns a copy of nested dicts, lists, tuples and tensors, with the tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: copies_on(device, item) for key, item in value.items()}
    if isinstance(value, list):
        return [copies_on(device, item) for item in value]
    if isinstance(value, tuple):
        return tuple(copies_on(device, item) for item in value)
    return value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint. Raises OSError; the file that was there is then still there, whole."""
    file = io.BytesIO()
    torch.save(content, file)
    data, temporary = file.getbuffer(), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(MAGIC + hashlib.sha256(data).digest())
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        previous = Path(f"{path}.previous")
        previous.unlink(missing_ok=True)
        with suppress(OSError):  # there is none yet, or the file system has no links
            os.link(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Returns what write() wrote, with tensors in main memory; executes nothing.

    Raises OSError, and RunError for what is no whole checkpoint.
    """
    data = path.read_bytes()
    if data[:HEAD] != MAGIC + hashlib.sha256(data[HEAD:]).digest():
        raise RunError(f"checkpoint {path}: truncated, altered or no checkpoint")
    try:
        content = torch.load(io.BytesIO(data[HEAD:]), map_location="cpu", weights_only=True)
    except Exception as e:
        raise RunError(f"checkpoint {path}: not of this version's format ({type(e).__name__})") from None
    if not isinstance(content, dict) or not {"made_by", "phase", "state"} <= content.keys():
        raise RunError(f"checkpoint {path}: not of this version's format")
    return content


def generators(device: torch.device) -> list[torch.Tensor]:
    """Returns the states of this process's random number generators: the CPU's and a GPU's, if it has one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return states


def set_generators(device: torch.device, states: list[torch.Tensor]) -> None:
    """Put back what generators() returned, perhaps for another kind of device."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


class Checkpoints(Hooks):
    """Writes checkpoints of this run, reads the one it goes on from, and stops it in good order on a signal.

    In a loop (training steps, chunks of test-time training) all ranks agree on when to save and when to stop;
    a signal waits for that. Elsewhere all that can be saved is saved: a rank that got the signal ends at once
    and tells the others.
    """

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.found: dict[str, Any] = {}  # what to go on from, until it is handed over
        self.phase = ""  # of that
        self.inputs: dict[str, str] = {}
        self.evaluation: Evaluation | None = None
        self.signalled, self.agreed = "", False  # the signal that came to this rank; all ranks know of one
        self.looping = False
        self.last = time.monotonic()  # when a state was last saved
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None  # what is being written
        self.handlers: dict[int, Any] = {}  # of the signals, as they were
        self.saved: Path | None = None  # where there is something to go on from

    def on_start(self, run: Run) -> None:
        """Read the checkpoint to go on from, if any. Raises RunError."""
        self.run, s = run, run.settings
        self.path = run.log_path.with_suffix(".ckpt")
        self.source = self.path if s.resume in ("", "auto") else Path(s.resume)
        self.made_by = {name: show(getattr(s, name)) for name in KEPT if name.upper() not in MAY_DIFFER}
        self.made_by["source"] = hashlib.sha256(Path(train_gpt.__file__).read_bytes()).hexdigest()
        if not s.eval_only:
            shards = together(lambda: open_shards(s.data_path, "train"))
            self.made_by["train_shards"] = str([len(shard) for shard in shards])
        if s.resume:
            self.found = from_rank0(together(self.find, 1))
        if self.found:
            self.phase, self.saved = self.found["phase"], self.source
            together(lambda: drop_torn_line(run.log_path), 1)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
                self.handlers[number] = signal.signal(number, self.terminate)

    def find(self) -> dict[str, Any]:
        """Returns the content to go on from, {} for RESUME=auto without a file. Raises RunError, OSError."""
        s, path = self.run.settings, self.source
        if s.resume == "auto" and not path.exists():
            if has_result(self.run.log_path):
                name = self.run.log_path
                raise RunError(f"RUN_ID={s.run_id} has its result already, see {name}; give another RUN_ID")
            return {}
        content = read(path)
        if s.eval_only and content["phase"] != "scoring":
            raise RunError(f"checkpoint {path}: of training, not of scoring an artifact; give another RUN_ID")
        for name, value in self.made_by.items():
            other = content["made_by"].get(name)
            if name == "train_shards" and content["phase"] == "scoring":
                continue  # they have done their part
            if other != value and name == "source":
                raise RunError(f"checkpoint {path}: made by another train_gpt.py")
            if other != value:
                raise RunError(f"checkpoint {path}: made with {name.upper()}={other}, not {value}")
        return content

    def terminate(self, number: int, _: object) -> None:
        """Do what the signal asks for later, where it can be done."""
        self.signalled = signal.Signals(number).name

    def restore_phase(self) -> str:
        """Returns the phase of the checkpoint, or "" if there is none."""
        return self.phase

    def restore(self) -> dict[str, Any] | None:
        """Returns the state to go on from, on the run's device; it is not kept here."""
        found, self.found = self.found, {}
        if not found:
            return None
        set_generators(self.run.device, found["generators"])
        return copies_on(self.run.device, found["state"])

    def restore_training(self) -> dict[str, Any] | None:
        """Returns the Trainer's state, if any. Its loop begins; before a first step nothing is due."""
        self.begin_loop(0)
        return self.restore()

    def restore_scoring(self) -> dict[str, Any] | None:
        """Returns the Evaluation's state, if any."""
        return self.restore()

    def save(self, phase: str, owner: Stateful) -> None:
        """Copy the state now, on all ranks; on rank 0 a thread writes it."""
        state = owner.state_dict()
        self.last = time.monotonic()
        if rank() == 0:
            self.report()
            content = {"made_by": self.made_by, "phase": phase, "inputs": self.inputs, "state": state}
            content["generators"] = generators(self.run.device)
            self.pending = self.pool.submit(write, self.path, copies_on("cpu", content))
            self.saved = self.path

    def report(self) -> None:
        """Wait for the last write. If it failed, the run goes on: the checkpoint before is still there."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as e:
            self.saved = self.path if self.path.exists() else None
            line = "checkpoint {path} could not be written: {reason}; going on"
            self.run.log.event("checkpoint_failed", line, path=str(self.path), reason=str(e))

    def begin_loop(self, visit: int) -> None:
        """Begin a loop, which a signal ends only where all ranks save. At visit 0 it is too early."""
        self.looping, self.visit, self.next = True, visit, 1
        self.asked, self.gap = (0, time.monotonic()), 1

    def due(self, *, at_once: bool = False) -> bool:
        """Returns whether to save now, on which all ranks agree. At some visits, ten a second, they talk."""
        visit, self.visit = self.visit, self.visit + 1
        if visit < self.next and not at_once:
            return False
        every, now = self.run.settings.checkpoint_every, time.monotonic()
        late = rank() == 0 and every > 0 and now - self.last >= every
        pace = 0.0  # visits a second, by rank 0's clock
        if rank() == 0:
            pace = max(visit - self.asked[0], 1) / max(now - self.asked[1], 1e-3)
        words = torch.tensor([bool(self.signalled), late, pace], dtype=torch.float64)
        signals, lates, pace = all_reduce(words).tolist()
        self.asked, self.gap = (visit, now), max(1, min(2 * self.gap, int(0.1 * pace)))
        self.next, self.agreed = visit + self.gap, signals > 0
        return at_once or signals + lates > 0

    def save_in_loop(self, phase: str, owner: Stateful, **position: int) -> None:
        """Save and log where the run is; if it has to stop here, wait on all ranks until that is on disk."""
        self.save(phase, owner)
        self.run.log.event("checkpoint", **position)
        if self.agreed:
            together(self.report, 1)

    def on_step(self, trainer: Trainer, last: bool) -> None:
        """Save the state if it is time, and in any case after the last step."""
        if self.due(at_once=last):
            self.save_in_loop("training", trainer, step=trainer.done)
        self.looping = not last

    def hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of all that scoring reads. Raises OSError.

        The artifact is on disk for good before a checkpoint of training makes way.
        """
        s, artifact = self.run.settings, self.run.artifact_path
        with open(artifact, "rb") as file:
            os.fsync(file.fileno())
        paths = {"artifact": artifact, "tokenizer": Path(s.tokenizer_path)}
        for path in sorted(Path(s.data_path).glob("fineweb_val_*.bin")):
            paths[f"shard {path.name}"] = path
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

    def on_scoring(self, evaluation: Evaluation) -> None:
        """Save that there is an artifact. Raises RunError if the checkpoint is of another or other text."""
        self.looping, self.evaluation = False, evaluation
        self.inputs = from_rank0(together(self.hashes, 1))
        if self.phase != "scoring":
            self.save("scoring", evaluation)
            return
        for name, value in self.found["inputs"].items():
            if self.inputs.get(name) != value:
                raise RunError(f"checkpoint {self.source}: made with another {name}")

    def on_chunk_start(self, ttt: TestTimeTraining, chunk: int) -> None:
        """Before the first chunk, begin the loop."""
        if not self.looping:
            self.begin_loop(1)

    def on_chunk(self, ttt: TestTimeTraining) -> None:
        """Save the evaluation's state if it is time."""
        if self.evaluation is not None and self.due():
            self.save_in_loop("scoring", self.evaluation, chunk=len(ttt.records))

    def on_stage(self, name: str, score: Score) -> None:
        """Save the scores."""
        self.looping = False
        if self.evaluation is not None:
            self.save("scoring", self.evaluation)

    def should_stop(self, *, in_loop: bool = False) -> bool:
        """Returns in a loop what all ranks last agreed on, elsewhere whether this rank got a signal."""
        return self.agreed if in_loop else bool(self.signalled) and not self.looping

    def finish(self) -> None:
        """Wait for the last write and end the thread of writing."""
        self.report()
        self.pool.shutdown()

    def on_stopped(self) -> None:
        """Log how to go on, and tell the other ranks unless they stop, too."""
        self.finish()
        how = "go on with RESUME={path}" if self.saved else "nothing is saved"
        name = self.signalled or "a signal"  # that came to another rank
        self.run.log.event("stopped", f"stopped by {name}; {how}", path=str(self.saved or ""))
        if self.watch is not None:
            self.watch.end("" if self.agreed else f"rank {rank()} was stopped by {name}")

    def on_error(self, error: BaseException) -> None:
        """After a signal, stop as on_stopped() does: the error is that other ranks have stopped, too.

        Else let the signal end the process, since nothing can be saved any more.
        """
        self.looping = False
        if self.signalled:
            self.on_stopped()
            return
        self.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_end(self) -> None:
        """Remove the checkpoints: the run has its result, and a signal does not matter any more."""
        self.pool.shutdown()
        if rank() == 0:
            self.path.unlink(missing_ok=True)
            Path(f"{self.path}.previous").unlink(missing_ok=True)
