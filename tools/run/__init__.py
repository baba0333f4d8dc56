"""Hooks for train_gpt.py, which uses them where this folder lies beside it; none changes what a run computes.

inputs.py looks at the shards, own.py keeps a RUN_ID to one run, events.py writes logs/RUN_ID.jsonl,
progress.py tells how far a stage is, watch.py ends a rank when another is lost, checkpoint.py lets a run go
on after it was stopped or killed, audit.py checks scoring. Each has a subclass of train_gpt.Hooks;
`make_hooks` puts together those that the settings ask for.
"""

import os
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from tools.common.spelling import check_names
from tools.run.checkpoint import Checkpoints
from tools.run.events import Events
from tools.run.inputs import Inputs
from tools.run.own import Ownership
from tools.run.progress import Progress
from tools.run.watch import Watch
from train_gpt import (
    Evaluation,
    Hooks,
    Learner,
    Read,
    Run,
    Score,
    Settings,
    TestTimeTraining,
    Trainer,
    world_size,
)


class HookGroup(Hooks):
    """Calls several hooks in order, and in reverse order when the run ends: the first are needed longest."""

    def __init__(self, hooks: list[Hooks]) -> None:
        self.hooks = hooks

    def __str__(self) -> str:
        return ",".join(type(hook).__name__.lower() for hook in self.hooks)

    def on_start(self, run: Run) -> None:
        """Pass it on. Raises RunError."""
        for hook in self.hooks:
            hook.on_start(run)

    def restore_phase(self) -> str:
        """Returns the first phase that is none of a new run."""
        phases = [hook.restore_phase() for hook in self.hooks]
        return next(filter(None, phases), "")

    def restore_training(self) -> dict[str, Any] | None:
        """Returns the first state that there is."""
        states = [hook.restore_training() for hook in self.hooks]
        return next((state for state in states if state is not None), None)

    def restore_scoring(self) -> dict[str, Any] | None:
        """Returns the first state that there is."""
        states = [hook.restore_scoring() for hook in self.hooks]
        return next((state for state in states if state is not None), None)

    def should_stop(self, *, in_loop: bool = False) -> bool:
        """Returns whether any wants to stop."""
        return any(hook.should_stop(in_loop=in_loop) for hook in self.hooks)

    def on_event(self, name: str, values: dict[str, Any]) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_event(name, values)

    def on_progress(self, stage: str, done: float) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_progress(stage, done)

    def on_step(self, trainer: Trainer, last: bool) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_step(trainer, last)

    def on_scoring(self, evaluation: Evaluation) -> None:
        """Pass it on. Raises RunError."""
        for hook in self.hooks:
            hook.on_scoring(evaluation)

    def on_read(self, read: Read) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_read(read)

    def on_scores(self, read: Read, scored: Tensor, sums: Tensor) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_scores(read, scored, sums)

    def on_chunk_start(self, ttt: TestTimeTraining, chunk: int) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_chunk_start(ttt, chunk)

    def before_update(self, learner: Learner) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.before_update(learner)

    def on_update(self, learner: Learner) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_update(learner)

    def on_chunk(self, ttt: TestTimeTraining) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_chunk(ttt)

    def on_stage(self, name: str, score: Score) -> None:
        """Pass it on."""
        for hook in self.hooks:
            hook.on_stage(name, score)

    def on_end(self) -> None:
        """Pass it on, last hook first, up to one that fails. Raises RunError."""
        for hook in reversed(self.hooks):
            hook.on_end()

    def on_stopped(self) -> None:
        """Pass it on, last hook first, to all even if one fails."""
        with ExitStack() as calls:
            for hook in self.hooks:
                calls.callback(hook.on_stopped)

    def on_error(self, error: BaseException) -> None:
        """Pass it on, last hook first, to all even if one fails."""
        with ExitStack() as calls:
            for hook in self.hooks:
                calls.callback(hook.on_error, error)


def make_hooks(s: Settings) -> HookGroup:
    """Returns the hooks that a run with these settings has, once its processes are joined.

    Raises RunError for variables that were meant as settings and are none.
    """
    check_names(os.environ)
    watch = Watch() if world_size() > 1 else None
    checkpoints = Checkpoints(watch) if s.checkpoint_every or s.resume else None
    phase = checkpoints.restore_phase if checkpoints else Hooks().restore_phase
    hooks = [
        hook for hook in (watch, Inputs(), Ownership(phase), Events(phase), Progress(), checkpoints) if hook
    ]
    if s.audit:
        from tools.run.audit import Audit  # it is needed by few runs

        hooks.append(Audit(s))
    return HookGroup(hooks)
