"""Checkpoints of a run of train_gpt.py, in one file, logs/RUN_ID.ckpt, from which RESUME=path or RESUME=auto goes on.

The file: 8 bytes MAGIC, the SHA-256 of all that follows, what torch.save() made of a dict: `made_by` (source and settings,
which must be the resuming run's; the number of processes need not), `phase`, and

    training: step, elapsed (seconds of training), weights, AdamW's state, Muon's momentum of whole banks, averages and their
              samples, the quantizer's base steps and knob, the state of the random number generators
    scoring:  SHA-256 of what it reads, scores and seconds of the stages that are done; in TTT also sums and epochs of the
              chunks done, weights, keys and values of the past, SGD's state. The weights to begin with are in the artifact.

A file is written whole, under another name, and then takes the place of the one before, which stays as
logs/RUN_ID.ckpt.previous: should the last state already lead to numbers that are none, that one may not.
Training waits only for the copy to main memory; a thread writes.
"""

import hashlib
import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

MAGIC = b"GPTCKPT1"
STOPPED = 75  # exit status after SIGTERM: run again, with RESUME
MAY_DIFFER = {
    "TRAIN_LOG_EVERY",
    "VAL_LOSS_EVERY",
    "MAX_WALLCLOCK_SECONDS",
    "EVAL_MAX_SECONDS",
}  # when resuming


def to_cpu(value: Any) -> Any:
    """A copy in main memory of nested dicts, lists and tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, state: dict) -> None:
    """Raises OSError; the file that was there is then still there, whole."""
    file = io.BytesIO()
    torch.save(state, file)
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


def read(path: Path, error: type[Exception]) -> dict:
    """Raises OSError, and `error` for what is no whole checkpoint; executes nothing."""
    data = path.read_bytes()
    if data[:40] != MAGIC + hashlib.sha256(data[40:]).digest():
        raise error(f"checkpoint {path}: truncated, altered or no checkpoint")
    try:
        return torch.load(io.BytesIO(data[40:]), map_location="cpu", weights_only=True)
    except Exception as e:
        raise error(f"checkpoint {path}: not of this version's format ({type(e).__name__})") from None


class Keeper:
    """Writes checkpoints of this run, reads the one it resumes from, and stops it in good order on SIGTERM."""

    def __init__(self, program: ModuleType, s: Any, watch: Any) -> None:
        """Raises RunError."""
        self.program, self.s, self.watch, self.path = program, s, watch, Path(f"logs/{s.run_id}.ckpt")
        self.source = self.path if s.resume in ("", "auto") else Path(s.resume)
        self.state = {}
        self.terminated, self.looping, self.next, self.last = False, False, 0, time.monotonic()
        self.pool, self.written, self.saved = ThreadPoolExecutor(1), None, None
        self.made_by = {
            name: program.show(getattr(s, name)) for name in program.NAMES if name.upper() not in MAY_DIFFER
        }
        self.made_by["source"] = hashlib.sha256(Path(program.__file__).read_bytes()).hexdigest()
        if s.resume:
            self.state = program.from_rank0(program.together(self.read, 1))
            self.saved = self.source if self.state else None
        self.scores = {name: program.Score(*score) for name, score in self.state.get("scores", {}).items()}
        self.seconds = dict(
            self.state.get("seconds", {})
        )  # that each stage took, the present one's so far as ""
        self.spent_before = dict(self.seconds)
        signal.signal(signal.SIGTERM, self.terminate)

    def read(self) -> dict:
        """The state to go on from; empty for RESUME=auto without a checkpoint. Raises RunError, OSError."""
        error, path = self.program.RunError, self.source
        if self.s.resume == "auto" and not path.exists():
            return {}
        state = read(path, error)
        if not isinstance(state, dict) or not {"phase", "made_by"} <= state.keys():
            raise error(f"checkpoint {path}: not of this version's format")
        if self.s.eval_only and state["phase"] != "scoring":
            raise error(f"checkpoint {path}: of training, not of scoring an artifact; give another RUN_ID")
        made_by = state["made_by"]
        for name, value in self.made_by.items():
            if made_by.get(name) != value:
                raise error(
                    f"checkpoint {path}: made by another train_gpt.py"
                    if name == "source"
                    else f"checkpoint {path}: made with {name.upper()}={made_by.get(name)}, not {value}"
                )
        return state

    def terminate(self, *_: Any) -> None:
        """What SIGTERM does."""
        self.terminated = True

    def save(self, **state: Any) -> None:
        """On rank 0: copy the state now, write it on a thread."""
        self.last = time.monotonic()
        if self.program.rank() == 0:
            self.report()
            self.written = self.pool.submit(write, self.path, to_cpu(state | {"made_by": self.made_by}))
            self.saved = self.path

    def report(self) -> None:
        """Wait for the last write. One that failed costs nothing but itself: the checkpoint before is still there."""
        written, self.written = self.written, None
        try:
            if written:
                written.result()
        except OSError as e:
            self.saved = self.path if self.path.exists() else None
            self.program.log(
                "checkpoint_failed",
                "checkpoint {path} could not be written: {reason}; going on",
                path=str(self.path),
                reason=str(e),
            )

    def due(self, position: int) -> bool:
        """Whether to save now; all ranks agree on it. Asked at each position, it lets ranks talk ten times a second."""
        if position < self.next:
            return False
        rank, every, now = self.program.rank(), self.s.checkpoint_every, time.monotonic()
        pace = max(position - self.asked[0], 1) / max(now - self.asked[1], 1e-3)
        late = rank == 0 and every and now - self.last >= every
        stop, late, pace = self.program.all_reduce(
            torch.tensor([self.terminated, late, pace * (rank == 0)], dtype=torch.float64)
        ).tolist()
        self.asked, self.gap = (position, now), max(1, min(2 * self.gap, int(0.1 * pace)))
        self.next = position + self.gap
        self.terminated = stop > 0
        return stop + late > 0

    def loop(self, position: int) -> None:
        """A loop begins, in which SIGTERM waits until the state can be saved."""
        self.looping, self.asked, self.gap, self.next = True, (position, time.monotonic()), 1, position + 1

    def stop_if_asked(self) -> None:
        """After SIGTERM, on all ranks: end once the state is on disk."""
        if self.terminated:
            self.program.together(self.report, 1)
            self.stop()

    def stop(self, others: str = "") -> None:
        """End this process. `others`: what to tell the other ranks unless they stop, too."""
        self.report()
        self.program.log(
            "stopped",
            f"stopped by SIGTERM; {'go on with RESUME={path}' if self.saved else 'nothing is saved'}",
            path=str(self.saved or ""),
        )
        if self.watch:
            self.watch.end(others)
        os._exit(STOPPED)  # threads of PyTorch may abort a normal exit

    def progress(self) -> None:
        """Outside of the loops all that can be saved is: end at once."""
        if self.terminated and not self.looping:
            self.stop(f"rank {self.program.rank()} was stopped by SIGTERM")

    def resume(self, trainer: Any, averages: Any) -> tuple[int, float] | None:
        """Put everything back as it was; (step, seconds of training). Raises RunError."""
        program, state = self.program, self.state
        self.loop(state.get("step", 0))
        if not state:
            return None
        shards = [len(shard) for shard in trainer.shards]
        if state["shards"] != shards:
            raise program.RunError(
                f"checkpoint {self.source}: made with train shards of {state['shards']} tokens, not {shards}"
            )
        optimizers, device = trainer.optimizers, trainer.device
        program.copy_weights(trainer.weights, [w.to(device) for w in state["weights"]])
        optimizers.adamw.load_state_dict(state["adamw"])
        for buffer, whole in zip(optimizers.momentum, state["momentum"]):
            own = whole[program.rank() * len(buffer) :][: len(buffer)]
            buffer.zero_()[: len(own)] = own
        averages.samples = state["samples"]
        averages.averages = {
            name: [w.to(device) for w in weights] for name, weights in state["averages"].items()
        }
        if state["base"]:
            trainer.base, trainer.knob = (
                {name: t.to(device) for name, t in state["base"].items()},
                state["knob"],
            )
            trainer.steps = program.scaled(trainer.base, trainer.knob)
        torch.set_rng_state(state["generators"][0])
        if device.type == "cuda" and len(state["generators"]) > 1:
            torch.cuda.set_rng_state(state["generators"][1])
        self.state = {}
        program.log("resumed", step=state["step"])
        return state["step"], state["elapsed"]

    def step(self, trainer: Any, averages: Any, step: int, elapsed: float, last: bool) -> None:
        """Before each step of training, and after the last."""
        self.next = step if last else self.next
        if not self.due(step) and not last:
            return
        optimizers = trainer.optimizers
        momentum = [
            self.whole(buffer)[: len(bank)] for buffer, bank in zip(optimizers.momentum, optimizers.banks)
        ]
        generators = [torch.get_rng_state()] + (
            [torch.cuda.get_rng_state()] if trainer.device.type == "cuda" else []
        )
        self.save(
            phase="training",
            step=step,
            elapsed=elapsed,
            weights=trainer.weights,
            adamw=optimizers.adamw.state_dict(),
            momentum=momentum,
            averages=averages.averages,
            samples=averages.samples,
            generators=generators,
            base=trainer.steps and trainer.base,
            knob=trainer.steps and trainer.knob,
            shards=[len(shard) for shard in trainer.shards],
        )
        self.program.log("checkpoint", step=step)
        self.stop_if_asked()
        self.looping = not last

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """All ranks' shards (n, rows, columns), one after the other."""
        shards = [torch.empty_like(shard) for _ in range(self.program.world_size())]
        if len(shards) == 1:
            return shard
        dist.all_gather(shards, shard)
        return torch.cat(shards)

    def begin_scoring(self, artifact: Path) -> float:
        """The artifact is written. The seconds that scoring took before. Raises RunError if the checkpoint is of scoring
        another artifact or other text."""
        self.looping, self.began = False, time.monotonic()
        self.inputs = self.program.from_rank0(self.program.together(lambda: self.hashes(artifact), 1))
        if self.state.get("phase") != "scoring":
            self.save_scoring()
        for path, value in self.state.get("inputs", self.inputs).items():
            if self.inputs.get(path) != value:
                raise self.program.RunError(f"checkpoint {self.source}: made with another {path}")
        return sum(self.seconds.values())

    def hashes(self, artifact: Path) -> dict[str, str]:
        """SHA-256 of what scoring reads. The artifact is on disk for good before a checkpoint of training makes way."""
        with open(artifact, "rb") as file:
            os.fsync(file.fileno())
        paths = dict(artifact=artifact, tokenizer=Path(self.s.tokenizer_path)) | {
            f"shard {path.name}": path for path in sorted(Path(self.s.data_path).glob("fineweb_val_*.bin"))
        }
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

    def save_scoring(self, **state: Any) -> None:
        self.save(
            phase="scoring", scores=dict(self.scores), seconds=dict(self.seconds), inputs=self.inputs, **state
        )

    def lap(self) -> None:
        """Add the time since the last call to the present stage's."""
        now = time.monotonic()
        self.seconds[""] = self.seconds.get("", 0) + now - self.began
        self.began = now

    def stage(self, name: str, score: Any) -> None:
        """A stage has its score."""
        self.looping = False
        if name != "averaged" and name not in self.scores:
            self.lap()
            self.scores[name], self.seconds[name], self.state = score, self.seconds.pop(""), {}
            self.save_scoring()
        self.progress()

    def resume_ttt(self, learner: Any) -> list | None:
        """The records of the chunks done: (nats, tokens, bytes) fp64 on the device, epochs."""
        epochs = self.state.get("epochs")
        self.loop(len(epochs or ()))
        self.spent_before["legal_ttt"] = self.seconds.get("", 0)
        if not epochs:
            return None
        device = learner.weights[0].device
        self.program.copy_weights(learner.weights, [w.to(device) for w in self.state["weights"]])
        learner.past = [t.to(device) for t in self.state["past"]]
        if learner.sgd:
            learner.sgd.load_state_dict(self.state["sgd"])
        self.program.log("resumed", chunk=len(epochs))
        return list(zip(self.state["sums"].to(device).unbind(), epochs))

    def spent(self, stage: str) -> float:
        """Seconds that the stage took before the run was resumed."""
        return self.spent_before.get(stage, 0.0)

    def chunk(self, learner: Any, records: list) -> None:
        """After each chunk of test-time training."""
        if self.looping and self.due(len(records)):
            self.lap()
            sums, epochs = zip(*records)
            self.save_scoring(
                sums=torch.stack(sums),
                epochs=list(epochs),
                weights=learner.weights,
                past=learner.past,
                sgd=learner.sgd and learner.sgd.state_dict(),
            )
            self.program.log("checkpoint", chunk=len(records))
            self.stop_if_asked()

    def end(self) -> None:
        """The run has its result: there is nothing to go on from."""
        self.report()
        if self.program.rank() == 0:
            self.path.unlink(missing_ok=True)
            Path(f"{self.path}.previous").unlink(missing_ok=True)
        self.pool.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is done
