"""Check scoring against the challenge's rules, while a run scores (AUDIT=1) or once more from its artifact alone.

    python tools/audit.py logs/RUN_ID.bin SHARDS [--tokenizer T.model] [--compare logs/RUN_ID.audit.json]

SHARDS is the folder of the validation shards. Settings are in the artifact; scoring settings in the environment win. What is
found is compared with what the run's own audit left beside the artifact. Prints check and result; the exit status is 1 if
something is violated, 2 if the input is unusable.

The rules are that a score knows nothing of what comes after it (causality), that it is of probabilities (normalisation), that
the weights learn only from what was scored (score before update), and that the text is read once, left to right (single pass).
What is checked, by the name of the check in logs/RUN_ID.audit.json:

    positions  The text is the validation shards', and each of its targets is scored exactly once in each stage. (single pass)
    order      An update of the weights learns from targets that were recorded before; the chunks follow each other without
               gap or overlap. A running number of all scores and updates shows it. (score before update, single pass)
    weights    Nothing but such an update changes the weights, and every stage starts from the same. (score before update)
    sums       Of some targets, in their own contexts, the probabilities of all tokens that may stand there, each read by the
               program in place of the target, sum to 1, and the target's is the one recorded. (normalisation)
    reads      Some reads are repeated with all tokens after a random one replaced: scores before it stay as they are, bitwise.
               (causality)
    chunks     Some chunks of test-time training are scored twice from the same weights and past, once with all tokens after a
               random one replaced: scores before it are the same, bitwise. Hidden learning shows. (score before update)
    bytes      The targets' bytes are those of the text as SentencePiece decodes it, by documents, of long ones by parts. A run
               looks at as many random ones as its time allows, the check of an artifact alone at all.
    totals     Score, val_loss and val_bpb are those of what was recorded.
    files      No process opens a training shard, or anything of DATA_PATH but validation shards, and none has one still mapped.

Random choices come from a seed that is known only when scoring begins. Each check is made at least once a stage; more are made
while all takes less than 3% of the time of scoring, as far as a check costs more than noting what happens. Results are bitwise
those without an audit, except that TTT that has to save time has 3% less of it.
"""

import copy
import gc
import hashlib
import json
import math
import os
import platform
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

BUDGET, DECODING = 0.03, 0.01  # of the time of scoring: for all, for decoding documents
CHECKS = "positions order weights sums reads chunks bytes totals files".split()
REPLAYS = 64  # of chunks, at most
PIECE = 4096  # tokens of a document that are decoded at once
HEADER_BYTES = 1024  # of a shard
SUM_TOLERANCE, NATS_TOLERANCE = 1e-4, 1e-9  # of a sum of probabilities; of total nats, relative


# What a process opens

opened: list[str] | None = None  # since begin(); None: nobody asks


def note_opening(event: str, args: tuple) -> None:
    if event == "open" and opened is not None and isinstance(args[0], (str, bytes)):
        opened.append(os.path.abspath(os.fsdecode(args[0])))


@contextmanager
def openings() -> Iterator[list[str]]:
    """The files that this process opens meanwhile. Python keeps an audit hook for ever, so there is one for all."""
    global opened
    if not hasattr(sys, "_notes_openings"):
        sys.addaudithook(note_opening)
        sys._notes_openings = True
    opened = []
    try:
        yield opened
    finally:
        opened = None


def still_open() -> list[str]:
    """Files that this process has open or mapped; Linux alone says so."""
    found = []
    try:
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(link := f"/proc/self/fd/{name}"):
                found.append(os.readlink(link))
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            found += [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line]
    except OSError:
        pass
    return found


# What is known of a stage


class Eager:
    """A model as it is without compilation, which computes logits once for as long as it reads the same tokens."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen, self.reads = model, None, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any) -> Tensor:
        return type(self.model).forward(self, *args)

    def logits(self, tokens: Tensor, *more: Any) -> Tensor:
        if self.seen is None or not torch.equal(self.seen, tokens):
            self.seen, self.found, self.reads = tokens, self.model.logits(tokens, *more), self.reads + 1
        return self.found


class Stage:
    """What one process has recorded of a stage. `count` and `when` have an element for each target, how often it was scored and
    the number of the last score, and one more for what is no target; so has `nll`."""

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.targets, device = scorer, scorer.targets, scorer.tokens.device
        self.weights = list(scorer.model.parameters())
        self.count, self.when = torch.zeros(2, self.targets + 1, dtype=torch.int32, device=device)
        self.nll = None  # when the first score says of what type it is
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)
        self.number = 0  # of scores and updates so far
        self.chunks, self.updates = [], []  # dicts; [number, chunk, first target, last target + 1]
        self.first, self.records, self.span = (
            0,
            [],
            (0, 0),
        )  # of TTT: first chunk, its results, targets of the present chunk
        self.made, self.failed = Counter(), {}  # checks by name; a line for each that failed
        self.last = self.kept = None  # the last read; scores of a chunk that is replayed
        self.wanted = False  # check the next read of this chunk
        self.versions, self.print = self.version(), self.fingerprint()

    def version(self) -> int:
        return sum(w._version for w in self.weights)

    def fingerprint(self) -> int:
        """A sum of the weights' bits."""
        return int(sum(w.detach().view(torch.int32).sum(dtype=torch.int64) for w in self.weights))

    def fail(self, check: str, line: str) -> None:
        self.failed.setdefault((check, line.split(":")[0]), line)


class Read:
    """A call of Scorer.read() and the scores that came of it."""

    def __init__(
        self, read: Callable, scorer: Any, at: Tensor, matrices: Any, past: list | None, ranks: int
    ) -> None:
        self.read, self.scorer, self.at, self.matrices, self.past, self.ranks = (
            read,
            scorer,
            at,
            matrices,
            past,
            ranks,
        )
        self.grad = torch.is_grad_enabled()
        self.nll = self.scored = None

    def again(
        self, tokens: Tensor, model: Any = None, row: int | None = None, last: int | None = None
    ) -> Tensor:
        """The scores with other tokens, perhaps by another model, of one row only. Positions behind `last` read that one again,
        so that the read is as long as it was: the rotary base depends on the length."""
        scorer = copy.copy(self.scorer)
        scorer.tokens, scorer.model = tokens, model or scorer.model
        at, past = self.at, self.past and list(self.past)
        if row is not None:
            at, past = at[row : row + 1].clamp(max=last), past and [kv[:, row : row + 1] for kv in past]
        return self.read(scorer, at, self.matrices, past, self.ranks).detach()


def gather(value: Any) -> list:
    """Every process's, in the order of ranks."""
    found = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found *= dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def chunks_of(scorer: Any, s: Any) -> list[tuple[int, int]]:
    """The targets [low, high) of each chunk; in sliding windows those learnt from, of which most belong to it."""
    N, C, first = scorer.targets, s.ttt_chunk_tokens, scorer.window if s.eval_mode == "streaming" else 0
    lows = [0] * bool(first) + [*range(first, N, C)]
    return [*zip(lows, lows[1:] + [N])]


def differing(one: Tensor, other: Tensor, at: Tensor, known: Tensor) -> list[int]:
    """Positions at which what is known differs, in order."""
    return at[known & (one != other)].sort().values.tolist()


class Audit:
    """begin(), stage() after each stage of scoring, end(); every process calls them at the same points.

    While active, it stands in place of the functions of `program`, the module of train_gpt.py, that score and learn.
    """

    def __init__(self, program: ModuleType, s: Any, resumed: str = "", whole_text: bool = False) -> None:
        """s has DATA_PATH, TOKENIZER_PATH, RUN_ID; the model brings the rest. resumed: "scoring" if that goes on from a
        checkpoint. whole_text: decode all of it."""
        self.program, self.s, self.whole_text, self.active = program, s, whole_text, False
        self.resumed = resumed == "scoring"

    def begin(self, artifact: Path, tokenizer: Any) -> None:
        """Scoring begins, of the model in the file `artifact`, on the validation shards. Raises OSError."""
        self.start = time.perf_counter()
        program, self.spent, self.inside = self.program, 0.0, False
        with self.spending():
            self.seed = program.from_rank0(secrets.randbits(32))
            self.shared, self.own = random.Random(self.seed), random.Random(f"{self.seed} {program.rank()}")
            files = (
                dict(artifact=artifact, code=program.__file__) if program.rank() == 0 else {}
            )  # other nodes lack them
            data = {name: Path(path).read_bytes() for name, path in files.items()}
            self.files = program.from_rank0(
                {name: (hashlib.sha256(d).hexdigest(), len(d)) for name, d in data.items()}
            )
            self.tokenizer, self.text, t = tokenizer, self.read_text(), tokenizer
            self.boundary = np.array(
                [t.is_control(i) or t.is_unknown(i) or t.is_unused(i) for i in range(t.vocab_size())]
            )
            self.pieces, self.text_bytes, self.tables = self.split_text(), None, None
            self.current, self.first_print, self.stages, self.failed, self.settings = None, None, {}, [], {}
            self.replayed = self.material = None
            self.install()
        self.active = True

    def install(self) -> None:
        program, self.patches = self.program, ExitStack()
        self.opened = self.patches.enter_context(openings())
        for owner, name, stand_in in (
            (program.Scorer, "read", self.reading),
            (program.Scorer, "measure", self.measuring),
            (program.Learner, "learn", self.learning),
            (program.Learner, "update", self.updating),
            (program, "windowed_chunks", self.chunking),
            (program, "streamed_chunks", self.chunking),
            (program, "score_first_ttt", self.timing),
        ):
            self.patches.enter_context(patch.object(owner, name, stand_in(getattr(owner, name))))

    # Time

    @contextmanager
    def spending(self, wait: bool = False) -> Iterator[None]:
        """Count the time; `wait` for what the device has still to do, before and after."""
        sync = torch.cuda.synchronize if wait and torch.cuda.is_initialized() else lambda: None
        if self.inside:
            yield
            return
        sync()
        self.inside, start = True, time.perf_counter()
        try:
            yield
            sync()
        finally:
            self.inside, self.spent = False, self.spent + time.perf_counter() - start

    def affordable(self) -> bool:
        return self.spent <= BUDGET * (time.perf_counter() - self.start)

    # Stand-ins: each makes a function that does what the original does and notes it

    def stage_of(self, scorer: Any) -> Stage:
        if self.current is None:
            with self.spending(wait=True):
                stage = self.current = Stage(scorer)
                if self.first_print not in (None, stage.print) and not self.resumed:
                    stage.fail("weights", "the stage does not start from the weights of the first one")
                self.first_print, s = self.first_print or stage.print, scorer.model.s
                self.settings = {
                    name: self.program.show(getattr(s, name.lower())) for name in self.program.FIELDS
                }
        return self.current

    def watch(self, stage: Stage) -> None:
        if stage.versions != (now := stage.version()):
            stage.versions = now
            stage.fail("weights", "the weights changed outside an update")

    def reading(self, original: Callable) -> Callable:
        def read(scorer, at, matrices, past, ranks=1):
            before = past and list(past)
            nll = original(scorer, at, matrices, past, ranks)
            if self.replayed is None:
                stage = self.stage_of(scorer)
                stage.last = Read(original, scorer, at, matrices, before, ranks)
                if torch.is_grad_enabled():
                    self.material = at.aminmax()
            return nll

        return read

    def measuring(self, original: Callable) -> Callable:
        def measure(scorer, nll, at, begin, end):
            found = original(scorer, nll, at, begin, end)
            if self.replayed is not None:
                self.replayed.append((nll.detach(), at, (begin <= at) & (at < end)))
            else:
                stage = self.stage_of(scorer)
                with self.spending():
                    scored = (begin <= at) & (at < end) & (at >= 0) & (at < stage.targets)
                    self.record(stage, nll.detach(), at, scored, found)
                if stage.last and stage.last.at is at:
                    stage.last.nll, stage.last.scored = nll.detach(), scored
                    if stage.wanted if stage.chunks else self.own.random() < 0.25 and self.affordable():
                        stage.wanted = not self.check_read(stage)
            return found

        return measure

    def learning(self, original: Callable) -> Callable:
        def learn(learner, tokens, *args):
            stage, self.material = self.current, None
            if (
                stage
                and tokens.untyped_storage().data_ptr() == stage.scorer.tokens.untyped_storage().data_ptr()
            ):
                low = tokens.storage_offset() - stage.scorer.tokens.storage_offset()
                self.material = low, low + len(tokens) - 2
            try:
                original(learner, tokens, *args)
            finally:
                self.material = None

        return learn

    def updating(self, original: Callable) -> Callable:
        def update(learner, loss, lr):
            if self.replayed is None:
                with self.spending():
                    self.note_update()
            original(learner, loss, lr)
            if self.replayed is None and self.current:
                self.current.versions = self.current.version()

        return update

    def chunking(self, original: Callable) -> Callable:
        def chunks(scorer, learner, s, first=0):
            stage, spans = self.stage_of(scorer), chunks_of(scorer, s)
            n, stage.first = len(spans), first
            if self.resumed:
                stage.versions = stage.version()  # the weights are a checkpoint's
            forced = self.shared.choice(range(first or 1, n - 1) or [first])
            others = {
                self.shared.randrange(i * n // REPLAYS, max(i + 1, (i + 1) * n // REPLAYS))
                for i in range(REPLAYS)
            }
            inner = original(scorer, learner, s, first)
            for c in count(first):
                with self.spending():
                    chosen = c == forced or c in others and self.program.from_rank0(self.affordable())
                    stage.chunks.append(dict(chunk=c, number=stage.number, epochs=0))
                    stage.span, stage.wanted, stage.kept = (
                        spans[min(c, n - 1)],
                        chosen,
                        [] if chosen else None,
                    )
                    self.watch(stage)
                replay = chosen and self.replay(stage, learner, lambda other: original(other, learner, s, c))
                try:
                    score, learn = next(inner)
                except StopIteration:
                    stage.chunks.pop()
                    return
                self.watch(stage)
                if chosen:
                    self.compare(stage, *replay)
                yield score, learn and partial(self.learn_chunk, stage.chunks[-1], learn)

        return chunks

    @staticmethod
    def learn_chunk(chunk: dict, learn: Callable, epochs: int) -> None:
        chunk["epochs"] += epochs
        learn(epochs)

    def timing(self, original: Callable) -> Callable:
        """What the audit takes is not what scoring takes: TTT does not slow down for it, and keeps the time free."""

        def score_first_ttt(scorer, learner, s, seconds=None):
            stage, less = self.stage_of(scorer), copy.copy(s)
            less.eval_max_seconds *= 1 - BUDGET
            total, stage.records = original(
                scorer, learner, less, seconds and (lambda: seconds() - self.spent)
            )
            return total, stage.records

        return score_first_ttt

    # Noting

    def record(self, stage: Stage, nll: Tensor, at: Tensor, scored: Tensor, found: Tensor) -> None:
        self.watch(stage)
        stage.number += 1
        if stage.nll is None:
            stage.nll = nll.new_zeros(stage.targets + 1)
        index = torch.where(scored, at, stage.targets).flatten()
        stage.count.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        stage.when.index_fill_(0, index, stage.number)
        stage.nll.index_copy_(0, index, nll.flatten())
        stage.bytes += found[2]
        if stage.kept is not None:
            stage.kept.append((nll, at, scored))

    def note_update(self) -> None:
        stage = self.current
        if stage is None:
            self.failed.append(("order", "the weights learn outside a stage of scoring"))
            return
        self.watch(stage)
        stage.number += 1
        if self.material is None:
            stage.fail("order", "the weights learn from what is no part of the text that is scored")
        elif not (stage.updates and stage.updates[-1][2] is self.material):
            stage.updates.append([stage.number, len(stage.chunks) - 1, self.material])

    # Checks while it scores

    def replaced(self, tokens: Tensor, last: int, choice: random.Random) -> Tensor:
        """The tokens, with others for all behind number `last`."""
        generator, V = (
            torch.Generator(tokens.device).manual_seed(choice.getrandbits(62)),
            self.tokenizer.vocab_size(),
        )
        rest = tokens[last + 1 :]
        other = torch.randint(1, V, rest.shape, generator=generator, dtype=tokens.dtype, device=tokens.device)
        return torch.cat((tokens[: last + 1], (rest + other) % V))

    @contextmanager
    def aside(self) -> Iterator[list]:
        """What the program does meanwhile is no scoring; the list gets what it would have recorded."""
        with self.spending(wait=True):
            self.replayed = []
            try:
                yield self.replayed
            finally:
                self.replayed = None

    def check_read(self, stage: Stage) -> bool:
        """Repeat the last read, with other tokens behind a random one and with all tokens in place of a random one. False if it
        scored nothing. Where processes share the positions of a read, all do this together, each at its last position."""
        at, ranks = stage.last.at, stage.last.ranks
        if ranks > 1:
            b, t = 0, at.size(1) - 1
        elif stage.last.scored is not None and stage.last.scored.any():
            places = stage.last.scored.nonzero()
            b, t = places[self.own.randrange(len(places))].tolist()
        else:
            return False
        with self.aside():
            self.check_causality(stage, at[b, t].item())
            if ranks == 1 or stage.span[1] - stage.span[0] == ranks * at.size(1):
                self.check_sum(stage, b, t)
        return True

    def check_causality(self, stage: Stage, last: int) -> None:
        read, choice = stage.last, self.shared if stage.last.ranks > 1 else self.own
        last = choice.randrange(*stage.span) if read.ranks > 1 else max(last, read.at.min().item() + 1)
        with torch.set_grad_enabled(read.grad):
            again = read.again(self.replaced(read.scorer.tokens, last, choice))
        known = (read.at >= 0) & (read.at < last)
        if wrong := differing(again, read.nll, read.at, known):
            stage.fail(
                "reads",
                f"a later token was read: those behind number {last} change the score of position {wrong[0]}",
            )
        stage.made["reads"] += bool(known.any())

    @torch.no_grad()
    def check_sum(self, stage: Stage, b: int, t: int) -> None:
        """At row b, column t of the last read."""
        read, V, p = stage.last, self.tokenizer.vocab_size(), stage.last.at[b, t].item()
        tokens, model, nlls = read.scorer.tokens.clone(), Eager(read.scorer.model), []
        for token in range(V):
            tokens[p + 1] = token
            nlls.append(read.again(tokens, model, b, p)[0, t])
            if model.reads > 1:
                return stage.fail("sums", f"a target was read before it was scored: that of position {p}")
        nlls = torch.stack(nlls).double()
        total, real, recorded = (
            nlls.neg().exp().sum().item(),
            nlls[read.scorer.tokens[p + 1]].item(),
            read.nll[b, t].item(),
        )
        if not abs(total - 1) <= SUM_TOLERANCE:
            stage.fail(
                "sums",
                f"probabilities do not sum to 1: those of all tokens after position {p} to {total:.6f}",
            )
        if not abs(real - recorded) <= (
            1e-3 if read.matrices[0].dtype == torch.float32 else 0.25
        ):  # compiled: other roundings
            stage.fail(
                "sums",
                f"a score is not that of its context alone: position {p} has {recorded:.4f} nats, "
                f"with nothing behind it {real:.4f}",
            )
        stage.made["sums"] += 1

    def replay(self, stage: Stage, learner: Any, chunks: Callable) -> tuple[int, list, int]:
        """Score the present chunk ahead, the first of chunks(scorer), with other tokens behind a random one, and put everything
        back. Returns that one's number, what would have been recorded, and the fingerprint of the weights."""
        with self.aside() as recorded:
            low, high = stage.span
            last = self.shared.randint(min((low + high) // 2 + 1, high - 1), high - 1)
            weights, versions, fingerprint = (
                self.program.copies(learner.weights),
                stage.version(),
                stage.fingerprint(),
            )
            state = {
                name: list(value) if isinstance(value, list) else value
                for name, value in vars(learner).items()
            }
            sgd, other = learner.sgd and copy.deepcopy(learner.sgd.state_dict()), copy.copy(stage.scorer)
            other.tokens = self.replaced(other.tokens, last, self.shared)
            generator = chunks(other)
            next(generator, None)
            generator.close()
            if stage.version() != versions or stage.fingerprint() != fingerprint:
                self.program.copy_weights(learner.weights, weights)
                if sgd:
                    learner.sgd.load_state_dict(sgd)
            vars(learner).update(state)
            stage.versions = stage.version()
        return last, recorded, fingerprint

    def compare(self, stage: Stage, last: int, again: list, fingerprint: int) -> None:
        """What was recorded of the present chunk with what its replay gave."""
        with self.spending(wait=True):
            chunk, known = stage.chunks[-1]["chunk"], 0
            if stage.fingerprint() != fingerprint:
                stage.fail("weights", "the weights changed outside an update")
            for (one, at, scored), (other, other_at, _) in zip(stage.kept, again):
                if at.shape != other_at.shape:
                    again = []
                    break
                scored = scored & (at < last)
                known += scored.sum().item()
                if wrong := differing(one, other, at, scored):
                    stage.fail(
                        "chunks",
                        f"a chunk was scored with knowledge of its future: in chunk {chunk}, tokens behind "
                        f"number {last} change the score of position {wrong[0]}",
                    )
            if len(again) != len(stage.kept):
                stage.fail(
                    "chunks", f"a chunk is read in another way when its future is another: chunk {chunk}"
                )
            stage.made["chunks"] += known > 0

    # Checks at the end of a stage

    def stage(self, name: str, score: Any) -> None:
        """A stage has given this score."""
        if not self.active:
            return
        with self.spending(wait=True):
            stage, self.current = self.current, None
            found = self.stages[name] = dict(score._asdict(), val_loss=score.val_loss, val_bpb=score.val_bpb)
            if stage is None:  # of a checkpoint
                if not self.resumed:
                    self.failed.append(("positions", f"{name}: nothing of it was recorded"))
                return
            if not stage.chunks:
                if stage.last and not stage.made["reads"]:
                    self.check_read(stage)
                self.watch(stage)
                if stage.fingerprint() != stage.print:
                    stage.fail("weights", "the weights changed outside an update")
            stage.made += Counter(weights=1, order=1)
            self.check_positions(stage, score)
            if stage.chunks:
                self.check_order(stage, found)
            self.check_bytes(stage, score)
            made = [made for _, made in self.of_all_ranks(stage, name)]
            found["checks"] = dict(sum(made, Counter()))
            for check in CHECKS[:-1]:
                if not found["checks"].get(check) and (stage.chunks or check != "chunks"):
                    self.failed.append((check, f"{name}: was never checked: {check}"))

    def of_all_ranks(self, stage: Stage, name: str) -> list[tuple[list, Counter]]:
        """Each process's (failures, checks made); the failures of all become the audit's."""
        every = gather(
            ([(check, f"{name}: {line}") for (check, _), line in stage.failed.items()], stage.made)
        )
        self.failed += [failure for failures, _ in every for failure in failures]
        return every

    def check_positions(self, stage: Stage, score: Any) -> None:
        """And totals. A resumed run recorded the chunks before when it first scored them."""
        program, N = self.program, len(self.text) - 1
        before = program.Score(*map(sum, zip(*(score for score, _ in stage.records[: stage.first]))))
        begun, own = int(before.tokens), stage.count[:-1] > 0
        count = program.all_reduce(stage.count[:-1].clone())
        nats = (
            torch.where(own, stage.nll[:-1], 0).sum(dtype=torch.float64)
            if stage.nll is not None
            else stage.bytes
        )
        nats, size = program.all_reduce(torch.stack((nats, stage.bytes))).tolist()
        if stage.targets != N or not np.array_equal(stage.scorer.tokens.cpu().numpy(), self.text):
            stage.fail("positions", f"other text than the validation shards', which has {N} targets")
        count[:begun] += 1
        for what, wrong in (("never scored", count == 0), ("scored twice", count > 1)):
            if wrong.any():
                stage.fail(
                    "positions",
                    f"{what}: {wrong.sum().item()} positions, the first is {wrong.int().argmax().item()}",
                )
        nats, tokens, size = nats + before.nats, count.sum().item(), size + before.bytes
        for what, value, recorded in (
            ("nats", score.nats, nats),
            ("targets", score.tokens, tokens),
            ("bytes", score.bytes, size),
            ("val_loss", score.val_loss, nats / max(tokens, 1)),
            ("val_bpb", score.val_bpb, nats / math.log(2) / max(size, 1)),
        ):
            if not abs(value - recorded) <= NATS_TOLERANCE * abs(recorded):
                stage.fail(
                    "totals", f"{what} of the score are not those recorded: {value:.10g}, not {recorded:.10g}"
                )
        stage.made += Counter(positions=(N - begun) * (program.rank() == 0), totals=1)

    def check_order(self, stage: Stage, found: dict) -> None:
        """Notes each chunk: scores and updates before it, its number, [low, high) scored, [low, high) learnt from, epochs."""
        N, device, chunks = stage.targets, stage.when.device, len(stage.chunks)
        spans = [torch.as_tensor(end, device=device) for _, _, ends in stage.updates for end in ends]
        spans = torch.stack(spans).view(-1, 2).tolist() if spans else []
        first = torch.full(
            (N,), 2**31 - 1, dtype=torch.int32, device=device
        )  # the first update that learns from a target
        learnt = torch.full((2, chunks + 1), -N)  # -low, high of each chunk
        for (number, chunk, _), (low, last) in [*zip(stage.updates, spans)][::-1]:
            first[max(low, 0) : last + 1] = number
            learnt[:, chunk] = learnt[:, chunk].maximum(torch.tensor([-low, last + 1]))
        early, behind = stage.when[:N] > first, "adapted on before it was scored"
        if early.any():
            stage.fail(
                "order",
                f"{behind}: {early.sum().item()} positions, the first is {early.int().argmax().item()}",
            )
        starts = torch.tensor([chunk["number"] for chunk in stage.chunks], dtype=torch.int32, device=device)
        chunk = torch.searchsorted(starts, stage.when[:N]) - 1
        scored, at = torch.full((2, chunks + 1), -N, device=device), torch.arange(N, device=device)
        for row, value in zip(scored, (-at, at + 1)):
            row.scatter_reduce_(0, torch.where(chunk < 0, chunks, chunk), value, "amax")
        spans = torch.cat((scored, learnt.to(device)))[:, :-1].contiguous()
        if self.program.world_size() > 1:
            dist.all_reduce(spans, dist.ReduceOp.MAX)
        found["chunks"], end = [], None
        for chunk, span in zip(stage.chunks, spans.T.tolist()):
            scored, learnt = ([-low, high] if high > 0 else None for low, high in (span[:2], span[2:]))
            found["chunks"].append([chunk["number"], chunk["chunk"], scored, learnt, chunk["epochs"]])
            if scored:
                if end not in (None, scored[0]):
                    stage.fail(
                        "order",
                        f"chunks out of order: {chunk['chunk']} begins at position {scored[0]}, not {end}",
                    )
                end = scored[1]
            if learnt and learnt[1] > (end or 0):
                stage.fail("order", f"{behind}: chunk {chunk['chunk']} learns up to position {learnt[1] - 1}")

    # Bytes

    def read_text(self) -> np.ndarray:
        """The tokens of the validation shards (N + 1,)."""
        paths = sorted(Path(self.s.data_path).glob("fineweb_val_*.bin"))
        return np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in paths])

    def split_text(self) -> list[tuple[int, int]]:
        """This process's [low, high) of tokens, in random order, each within a document. Parts of one overlap by a token."""
        edges, pieces = [-1, *np.flatnonzero(self.boundary[self.text]).tolist(), len(self.text)], []
        for low, high in zip(edges, edges[1:]):
            pieces += [
                (i, min(i + PIECE, high))
                for i in range(low + 1, max(high - 1, low + 2), PIECE - 1)
                if i < high
            ]
        self.shared.shuffle(pieces)
        return pieces[self.program.rank() :: self.program.world_size()]

    def check_bytes(self, stage: Stage, score: Any) -> None:
        program, device, tables = self.program, stage.scorer.tokens.device, stage.scorer.tables
        if self.tables is None:
            self.tables = type(tables)(*(t.cpu() for t in tables))
            size, (low, high) = (
                torch.zeros((), dtype=torch.float64, device=device),
                program.share(len(self.text) - 1),
            )
            for i in range(low, high, 2**22):
                tokens = torch.from_numpy(self.text[i : min(i + 2**22, high) + 1].astype(np.int64)).to(device)
                size += tables.count(tokens[:-1], tokens[1:]).sum()
            self.text_bytes = program.all_reduce(size).item()
        if score.bytes != self.text_bytes:
            stage.fail(
                "bytes", f"other bytes than the whole text's: {score.bytes:.0f}, not {self.text_bytes:.0f}"
            )
        stage.made["bytes"] += 1
        end = time.perf_counter() + DECODING * (time.perf_counter() - self.start)
        while self.pieces and (not stage.made["documents"] or self.whole_text or time.perf_counter() < end):
            self.check_document(stage, *self.pieces.pop())

    def check_document(self, stage: Stage, low: int, high: int) -> None:
        """Or a part of one: the first token is a target only where a document begins behind another token."""
        start = low if low and self.boundary[self.text[low - 1]] else low + 1
        whole, context = (self.tokenizer.decode(self.text[low:end].tolist()) for end in (high, start))
        if "\ufffd" in whole + context:  # begins or ends within a character
            stage.made["undecodable"] += 1
            return
        tokens = torch.from_numpy(self.text[start - 1 : high].astype(np.int64))
        counted, size = (
            self.tables.count(tokens[:-1], tokens[1:]).sum().item(),
            len(whole.encode()) - len(context.encode()),
        )
        if counted != size:
            stage.fail(
                "bytes",
                f"a document's bytes are not those of its text: {counted}, not {size}, from token {start} on",
            )
        stage.made["documents"] += 1

    # The end

    def forbidden(self, path: str) -> bool:
        """Whether scoring has no business with a file."""
        path, allowed = Path(path), os.path.realpath(self.s.tokenizer_path)
        return path.name.startswith("fineweb_train_") or (
            os.path.realpath(path.parent) == os.path.realpath(self.s.data_path)
            and not path.name.startswith("fineweb_val_")
            and os.path.realpath(path) != allowed
        )

    def end(self, write: bool = True) -> dict[str, Any]:
        """What was found, the same on every process; rank 0 writes logs/RUN_ID.audit.json. Nothing is watched any more."""
        program, elapsed = self.program, time.perf_counter() - self.start
        self.patches.close()
        self.active = False
        if any(map(self.forbidden, still_open())):
            gc.collect()  # what nobody uses any more
        names = {path: "was opened" for path in self.opened} | {
            path: "is still open" for path in still_open()
        }
        wrong = [
            ("files", f"a file of no use to scoring {how}: {path}")
            for path, how in names.items()
            if self.forbidden(path)
        ]
        opened = [
            path
            for path in self.opened
            if not path.startswith((sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys"))
        ]
        every = gather((wrong, opened, self.spent / max(elapsed, 1e-9)))
        failed = dict.fromkeys(self.failed + [line for wrong, _, _ in every for line in wrong])
        found = dict(
            violations=[*dict.fromkeys(line for _, line in failed)],
            failed=sorted({check for check, _ in failed}),
            share=max(share for _, _, share in every),
            seconds=elapsed,
            seed=self.seed,
            processes=program.world_size(),
            hashes={name: sha256 for name, (sha256, _) in self.files.items()},
            sizes={name: size for name, (_, size) in self.files.items()},
            versions={name: version(name) for name in ("torch", "numpy", "sentencepiece")},
            python=platform.python_version(),
            stages=self.stages,
            opened=sorted({path for _, opened, _ in every for path in opened}),
            settings=self.settings,
        )
        if write and program.rank() == 0:
            program.write_atomically(f"logs/{self.s.run_id}.audit.json", (json.dumps(found) + "\n").encode())
        return found


# Once more, from the artifact


def audit_artifact(
    program: ModuleType, path: Path, environ: Mapping[str, str], device: torch.device
) -> dict[str, Any]:
    """What Audit.end() finds after scoring the artifact at path as EVAL_ONLY=1 does, for as long as it takes. Raises RunError,
    OSError."""
    from quant_report import settings_for

    made_with, kept, stored = program.unpack_artifact(path.read_bytes(), path)
    s = settings_for(environ, kept, path)
    tokenizer, fingerprint = program.load_tokenizer(s.tokenizer_path, s.vocab_size)
    if fingerprint != made_with:
        raise program.RunError(f"artifact {path}: made with another tokenizer than {s.tokenizer_path}")
    tokens = program.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len).to(device)
    attention, dtype = (
        program.choose_attention(device)[1],
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    with device:
        tables = program.byte_tables(tokenizer)
    model = program.GPT(s, attention, dtype)
    model.load_state_dict(program.dequantize(stored))
    model = model.on(device)
    program.compile_scoring(s, model, tables)
    audit = Audit(program, s, whole_text=True)
    audit.begin(path, tokenizer)
    try:
        for name, stage in program.scoring_stages(s, model, tokens, tables).items():
            audit.stage(name, stage())
        return audit.end(write=False)
    finally:
        audit.patches.close()


def differences(found: dict, run: dict) -> list[tuple[str, str]]:
    """(check, violation) where the audit of the artifact alone has found another thing than the run's own. Raises KeyError."""
    lines = [
        (
            f"same {what}",
            f"another {what} than the run's: SHA-256 {found['hashes'][what]}, not {run['hashes'][what]}",
        )
        for what in found["hashes"]
        if found["hashes"][what] != run["hashes"][what]
    ]
    alike = found["processes"] == run["processes"]
    tolerance, hint = (
        (1e-6, "") if alike else (1e-4, f"; repeat it on {run['processes']} processes")
    )  # relative
    if found["stages"].keys() != run["stages"].keys():
        lines.append(
            ("same scores", f"other stages than the run's: {[*found['stages']]}, not {[*run['stages']]}")
        )
    for name in found["stages"].keys() & run["stages"].keys():
        own, other = found["stages"][name], run["stages"][name]
        for what in ("val_loss", "val_bpb"):
            if not abs(own[what] - other[what]) <= tolerance * other[what]:
                lines.append(
                    (
                        "same scores",
                        f"{name}: another {what} than the run's: {own[what]:.8f}, not "
                        f"{other[what]:.8f}{hint}",
                    )
                )
        epochs, others = ([chunk[1::3] for chunk in stage.get("chunks", [])] for stage in (own, other))
        wrong = [chunk for chunk in others if chunk not in epochs]
        if wrong:
            lines.append(
                (
                    "same epochs",
                    f"{name}: other epochs than the run's: chunk {wrong[0][0]} is the "
                    "first; a run that saved time to keep EVAL_MAX_SECONDS cannot be repeated",
                )
            )
    return lines


def table(found: dict, compared: bool) -> str:
    """Check and result, a line each."""
    stages, lines = found["stages"].values(), []
    for check in CHECKS:
        made = sum(stage.get("checks", {}).get(check, 0) for stage in stages)
        more = sum(stage.get("checks", {}).get("documents", 0) for stage in stages)
        note = f" ({made:,}" + f", {more:,} documents" * (check == "bytes") + ")" if made else ""
        lines.append((check, note))
    lines += [
        (f"same {what}", "" if compared else " (no audit of the run to compare with)")
        for what in ("artifact", "code", "scores", "epochs")
    ]
    result = {
        check: "VIOLATED"
        if check in found["failed"]
        else "ok"
        if compared or not check.startswith("same")
        else "-"
        for check, _ in lines
    }
    return "\n".join(f"{check:<16}{result[check]}{note}" for check, note in lines)


def main(argv: list[str] | None = None) -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
    import train_gpt as T
    from bench import Parser, compile_newton_schulz

    parser = Parser(description="Check the scoring of an artifact against the challenge's rules.")
    parser.add_argument("artifact", type=Path, help="logs/RUN_ID.bin")
    parser.add_argument("shards", type=Path, help="folder of the validation shards")
    parser.add_argument(
        "--tokenizer", help="SentencePiece model (the setting TOKENIZER_PATH)", metavar="FILE"
    )
    parser.add_argument(
        "--compare", type=Path, help="a run's audit (RUN_ID.audit.json beside the artifact)", metavar="FILE"
    )
    args = parser.parse_args(argv)
    path = args.compare or args.artifact.with_suffix(".audit.json")
    environ = {**os.environ, "DATA_PATH": str(args.shards)} | (
        {"TOKENIZER_PATH": args.tokenizer} if args.tokenizer else {}
    )
    try:
        run = json.loads(path.read_text("utf-8")) if args.compare or path.exists() else None
        if run is not None:
            differences(run, run)  # an error now, not after minutes
        device = T.start_processes()
        if device.type == "cuda":
            compile_newton_schulz()
        found = audit_artifact(T, args.artifact, environ, device)
        lines = [] if run is None else differences(found, run)
    except (T.RunError, OSError) as e:
        parser.exit(2, f"error: {e}\n")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        parser.exit(
            2, f"error: {path}: no audit of a run ({type(e).__name__}: {e}); give another by --compare\n"
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    found["failed"] += {check for check, _ in lines}
    found["violations"] += [line for _, line in lines]
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            table(found, run is not None), *(f"violation: {line}" for line in found["violations"]), sep="\n"
        )
    sys.exit(bool(found["violations"]))


if __name__ == "__main__":
    main()
