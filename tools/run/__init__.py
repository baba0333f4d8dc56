"""Hooks for train_gpt.py, which uses them where this folder lies beside it; none changes what a run computes.

inputs.py looks at the shards, own.py keeps a RUN_ID to one run, events.py writes logs/RUN_ID.jsonl,
progress.py tells how far a stage is, experts.py what experts gave, watch.py ends a rank when another is lost,
checkpoint.py lets a run go on after it was stopped or killed, audit.py checks scoring. Each has a subclass of
train_gpt.Hooks;
`make_hooks` puts together those that the settings ask for.
"""

import os
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from tools.common.spelling import check_names
from tools.run.checkpoint import Checkpoints
from tools.run.events import Events
from tools.run.experts import Experts
from tools.run.inputs import Inputs
from tools.run.own import Ownership
from tools.run.progress import Progress
from tools.run.watch import Watch
from train_gpt import (
    Ensemble,
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
    """Calls several hooks in order, and in reverse order when the run ends: the first are needed longest.

    These are all there are. Ranks call them in one order, except on_event, on_progress, on_error. Only
    restore_* give a state, only should_stop ends a run; on_start, on_scoring, on_end may raise RunError.
    """

    def __init__(self, hooks: list[Hooks]) -> None:
        self.hooks = hooks

    def __str__(self) -> str:
        return ",".join(type(hook).__name__.lower() for hook in self.hooks)

    def on_start(self, run: Run) -> None:
        """Settings are read, nothing is written. Raises RunError."""
        for hook in self.hooks:
            hook.on_start(run)

    def restore_phase(self) -> str:
        """Returns what goes on: training, scoring, or nothing of a new run; of the first that knows."""
        phases = [hook.restore_phase() for hook in self.hooks]
        return next(filter(None, phases), "")

    def restore_training(self) -> dict[str, Any] | None:
        """Returns a Trainer's state, the first that there is."""
        states = [hook.restore_training() for hook in self.hooks]
        return next((state for state in states if state is not None), None)

    def restore_scoring(self) -> dict[str, Any] | None:
        """Returns an Evaluation's state, the first that there is."""
        states = [hook.restore_scoring() for hook in self.hooks]
        return next((state for state in states if state is not None), None)

    def should_stop(self, *, in_loop: bool = False) -> bool:
        """Returns whether any wants to end the run; `in_loop` ranks agree."""
        return any(hook.should_stop(in_loop=in_loop) for hook in self.hooks)

    def on_event(self, name: str, values: dict[str, Any]) -> None:
        """A line was logged, on rank 0; values are as in JSON."""
        for hook in self.hooks:
            hook.on_event(name, values)

    def on_progress(self, stage: str, done: float) -> None:
        """A share of a stage, 0 to 1, is done."""
        for hook in self.hooks:
            hook.on_progress(stage, done)

    def on_step(self, trainer: Trainer, last: bool) -> None:
        """A step, or none, is to come; the state is whole."""
        for hook in self.hooks:
            hook.on_step(trainer, last)

    def on_scoring(self, evaluation: Evaluation) -> None:
        """Scoring begins; the artifact is on disk. Raises RunError."""
        for hook in self.hooks:
            hook.on_scoring(evaluation)

    def on_read(self, read: Read) -> None:
        """Tokens were read, to score or to learn."""
        for hook in self.hooks:
            hook.on_read(read)

    def on_scores(self, read: Read, scored: Tensor, sums: Tensor) -> None:
        """Scores count, where `scored` (B, T); `sums` (3,): nats, number, bytes."""
        for hook in self.hooks:
            hook.on_scores(read, scored, sums)

    def on_chunk_start(self, ttt: TestTimeTraining, chunk: int) -> None:
        """A chunk is to be scored."""
        for hook in self.hooks:
            hook.on_chunk_start(ttt, chunk)

    def before_update(self, learner: Learner) -> None:
        """Weights are to learn."""
        for hook in self.hooks:
            hook.before_update(learner)

    def on_update(self, learner: Learner) -> None:
        """Weights have learnt."""
        for hook in self.hooks:
            hook.on_update(learner)

    def on_forget(self, learner: Learner) -> None:
        """Weights went back to the artifact's."""
        for hook in self.hooks:
            hook.on_forget(learner)

    def on_chunk(self, ttt: TestTimeTraining) -> None:
        """A chunk was scored and learnt from."""
        for hook in self.hooks:
            hook.on_chunk(ttt)

    def on_meeting(self, ttt: TestTimeTraining) -> None:
        """All ranks have come as far in the text; the state is whole."""
        for hook in self.hooks:
            hook.on_meeting(ttt)

    def on_expert(self, ttt: TestTimeTraining) -> None:
        """An expert has read all; its scores only count in the mixture."""
        for hook in self.hooks:
            hook.on_expert(ttt)

    def on_mixture(
        self, ensemble: Ensemble, members: dict[str, Tensor], mixed: Tensor, weights: Tensor
    ) -> None:
        """Losses (N,) of experts, then of caches, gave those that count, (N,), by weights (members, N)."""
        for hook in self.hooks:
            hook.on_mixture(ensemble, members, mixed, weights)

    def on_stage(self, name: str, score: Score) -> None:
        """A stage has its score; "averaged" is training's."""
        for hook in self.hooks:
            hook.on_stage(name, score)

    def on_end(self) -> None:
        """The result is there; the last hook first, up to one that fails. Raises RunError."""
        for hook in reversed(self.hooks):
            hook.on_end()

    def on_stopped(self) -> None:
        """The run ends as should_stop said; the last hook first, all even if one fails."""
        with ExitStack() as calls:
            for hook in self.hooks:
                calls.callback(hook.on_stopped)

    def on_error(self, error: BaseException) -> None:
        """This rank ends by an error; the last hook first, all even if one fails."""
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
    if s.ttt_experts:
        hooks.append(Experts())
    if s.audit:
        from tools.run.audit import Audit  # it is needed by few runs

        hooks.append(Audit(s))
    return HookGroup(hooks)
