"""Checks scoring against the challenge's rules while a run scores (AUDIT=1).

The rules: a score is of probabilities (normalisation) and knows nothing of what comes after it (causality);
weights learn only from what was scored (score before update); text is read once, in order (single pass).
Checks by name:

    positions  Each stage scores each target of the validation shards' text exactly once.
    order      An update learns from targets scored before; chunks follow each other without gap or overlap.
    weights    Nothing but an update changes the weights, and every stage starts from the artifact's.
    sums       Of some targets, in their own contexts, the probabilities of all tokens, each read by the
               program in place of the target, sum to 1, and the target's is the one recorded.
    reads      Some reads are repeated with all tokens behind a random one replaced: bitwise the same before.
    chunks     So are some chunks of test-time training, from the same weights and past: it shows what was
               learnt in secret.
    bytes      The targets' bytes are those of the text as SentencePiece decodes it, by documents and parts of
               them: in a run as many random ones as its time allows, in tools/reports/audit.py all.
    totals     Score, val_loss and val_bpb are those of what was recorded.
    files      No training shard, nor what else is beside the validation shards, is opened or still mapped.

The seed of random choices is drawn when scoring begins. Each check is made at least once a stage, more are
made while all takes less than 3% of the time, as far as a check costs more than noting what happens. Results
are bitwise those without an audit, except that test-time training that has to save time has 3% less of it.
"""

import copy
import gc
import hashlib
import json
import os
import platform
import random
import secrets
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt as T

BUDGET, DECODING = 0.03, 0.01  # of the time of scoring: for all, for decoding documents
CHECKS = ("positions", "order", "weights", "sums", "reads", "chunks", "bytes", "totals", "files")
REPLAYS = 64  # of chunks, at most
READS_CHECKED = 0.25  # of the reads outside of test-time training, while there is time
PIECE = 4096  # tokens of a document that are decoded at once
HEADER_BYTES = 1024  # of a shard
SUM_TOLERANCE, TOTAL_TOLERANCE = 1e-4, 1e-9  # of a sum of probabilities; of a total, relative
MOVED = "the weights changed outside an update"
EARLY = "adapted on before it was scored"
FOREIGN = "the weights learn from what is no part of the text that is scored"


# ======== Small parts ========


def variant(thing: Any, **attributes: Any) -> Any:
    """Returns a shallow copy with other attributes."""
    other = copy.copy(thing)
    vars(other).update(attributes)
    return other


def replaced(tokens: Tensor, last: int, vocab_size: int, choice: random.Random) -> Tensor:
    """Returns the tokens, with others for all behind number `last`."""
    generator = torch.Generator(tokens.device).manual_seed(choice.getrandbits(62))
    shift = torch.zeros_like(tokens)
    shift[last + 1 :].random_(1, vocab_size, generator=generator)
    return (tokens + shift) % vocab_size


def read_again(read: T.Read, at: Tensor, cache: T.KVCache | None, **changes: Any) -> Tensor:
    """Returns the losses (B, T) of a read with other positions, past and attributes of its scorer."""
    scorer = variant(read.scorer, hooks=T.NO_HOOKS, **changes)
    return scorer.read(at, read.matrices, cache and list(cache), read.ranks).losses.detach()


def differing(one: Tensor, other: Tensor, at: Tensor, known: Tensor) -> list[int]:
    """Returns the positions at which what is known differs, in order."""
    return at[known & (one != other)].sort().values.tolist()


def fingerprint(weights: list[Tensor]) -> int:
    """Returns a sum of the bits of fp32 weights."""
    return int(sum(w.detach().view(torch.int32).sum(dtype=torch.int64) for w in weights))


def tensors_of(state: Any) -> list[Tensor]:
    """Returns the tensors in nested containers, in order."""
    if isinstance(state, Tensor):
        return [state]
    items = list(state.values()) if isinstance(state, dict) else state
    return (
        [tensor for item in items for tensor in tensors_of(item)] if isinstance(items, list | tuple) else []
    )


def values_of(score: T.Score) -> dict[str, float]:
    """Returns a score by name."""
    return score._asdict() | {"val_loss": score.val_loss, "val_bpb": score.val_bpb}


def digest(path: Path) -> tuple[str, int]:
    """Returns SHA-256 and size of a file. Raises OSError."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)


def gather(value: Any) -> list:
    """Returns every process's value, in the order of ranks."""
    found = [value] * T.world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def lane_of(cache: T.KVCache, lane: int) -> T.KVCache:
    """Returns one lane's keys and values of a stream's past."""
    return [slot[:, lane : lane + 1] for slot in cache]


class LogitsOnce:
    """A model's logits, computed once for as long as it reads the same tokens."""

    def __init__(self, model: T.GPT) -> None:
        self.compute, self.tokens, self.reads = model.logits, None, 0

    def __call__(self, tokens: Tensor, *rest: Any) -> Tensor:
        """Returns the logits (B, T, V)."""
        if self.tokens is None or not torch.equal(self.tokens, tokens):
            self.tokens, self.found, self.reads = tokens, self.compute(tokens, *rest), self.reads + 1
        return self.found


class Openings:
    """Lists the files that this process opens while there is a list."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        """List a file that is opened."""
        if event == "open" and self.paths is not None and isinstance(args[0], str | bytes):
            self.paths.append(os.path.abspath(os.fsdecode(args[0])))


@cache
def openings() -> Openings:
    """Returns this process's only one, since Python keeps an audit hook for ever."""
    return Openings()


def still_open() -> list[str]:
    """Returns the paths of regular files that this process has open or mapped; only Linux says so."""
    found = []
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{name}"
            with suppress(FileNotFoundError):  # the listing's own
                if stat.S_ISREG(os.stat(link).st_mode):
                    found.append(os.readlink(link))
        maps = Path("/proc/self/maps").read_text("utf-8", errors="replace")
        found += [line.split(maxsplit=5)[5] for line in maps.split("\n") if " /" in line]
    return [path for path in found if path.startswith("/")]


def is_forbidden(path: str, s: T.Settings) -> bool:
    """Returns whether scoring has no business with a file."""
    folder, name = os.path.split(path)
    return name.startswith("fineweb_train_") or (
        os.path.realpath(folder) == os.path.realpath(s.data_path)
        and not name.startswith("fineweb_val_")
        and os.path.realpath(path) != os.path.realpath(s.tokenizer_path)
    )


class Text:
    """The validation text and what SentencePiece makes of it. Raises RunError, OSError."""

    def __init__(self, s: T.Settings, tables: T.ByteTables, choice: random.Random) -> None:
        paths = sorted(Path(s.data_path).glob("fineweb_val_*.bin"))
        self.tokens = np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in paths])
        self.tokenizer = t = T.load_tokenizer(s.tokenizer_path, s.vocab_size)[0]
        self.tables = type(tables)(*(table.cpu() for table in tables))
        ids = range(t.vocab_size())
        self.boundary = np.array([t.is_control(i) or t.is_unknown(i) or t.is_unused(i) for i in ids])
        edges = [-1, *np.flatnonzero(self.boundary[self.tokens]).tolist(), len(self.tokens)]
        self.pieces: list[tuple[int, int]] = []  # [low, high) in a document; parts overlap by a token
        for low, high in pairwise(edges):
            starts = range(low + 1, max(high - 1, low + 2), PIECE - 1)
            self.pieces += [(i, min(i + PIECE, high)) for i in starts if i < high]
        choice.shuffle(self.pieces)
        self.pieces = self.pieces[T.rank() :: T.world_size()]
        size, (low, high) = torch.zeros(1, dtype=torch.float64), T.share(len(self.tokens) - 1)
        for i in range(low, high, 2**22):
            size += self.count(i + 1, min(i + 2**22, high) + 1)
        self.bytes = T.all_reduce(size).item()  # by the program's tables

    def count(self, low: int, high: int) -> int:
        """Returns the bytes of tokens [low, high) by the program's tables."""
        tokens = torch.from_numpy(self.tokens[low - 1 : high].astype(np.int64))
        return int(self.tables.count(tokens[:-1], tokens[1:]).sum())

    def decode(self, low: int, high: int) -> tuple[int, int | None]:
        """Returns from which token on a piece's bytes count, and how many they are.

        The first is a target only where a document begins behind a token. None: the piece cuts a character.
        """
        start = low if low and self.boundary[self.tokens[low - 1]] else low + 1
        whole, context = (self.tokenizer.decode(self.tokens[low:end].tolist()) for end in (high, start))
        return start, None if "\ufffd" in whole + context else len(whole.encode()) - len(context.encode())


# ======== What is known of a stage ========


class Chunk(T.Hooks):
    """What was recorded of a chunk of test-time training, of targets [low, high), or of a whole stage.

    `number` is of the last score or update before it; `scored` and `learnt` are (-first, last + 1) position.
    """

    def __init__(self, index: int, span: tuple[int, int], number: int, nothing: Tensor) -> None:
        self.index, (self.low, self.high), self.number, self.epochs = index, span, number, 0
        self.scored = self.learnt = nothing
        self.chosen = self.unread = False  # it is replayed; its next read is to be checked
        self.scores: list[tuple[Tensor, Tensor, Tensor]] = []  # losses, positions, which count
        self.replay: Chunk | None = None  # with other tokens behind number `last`
        self.last = 0

    def on_scores(self, read: T.Read, scored: Tensor, sums: Tensor) -> None:
        """Keep scores."""
        self.scores.append((read.losses.detach(), read.at, scored))


class Stage:
    """What one process has recorded of a stage of scoring.

    `count` (of scores), `nats`, `learnt` (from) and `early` (learnt from before it was scored) have an
    element for each target, and one more for what is no target.
    """

    def __init__(self, scorer: T.Scorer) -> None:
        self.tokens, self.targets, device = scorer.tokens, scorer.targets, scorer.tokens.device
        self.weights, size = list(scorer.model.parameters()), self.targets + 1
        self.count = torch.zeros(size, dtype=torch.int32, device=device)
        self.nats = torch.zeros(size, device=device)
        self.learnt, self.early = torch.zeros(2, size, dtype=torch.bool, device=device)
        self.bytes = torch.zeros((), dtype=torch.float64, device=device)
        self.number = 0  # of scores and updates so far
        self.nothing = torch.full((2,), -size, device=device)
        self.chunks: list[Chunk] = []
        self.chunk = Chunk(-1, (0, self.targets), 0, self.nothing)  # the present one
        self.material: list[tuple[Chunk, Tensor | None]] = []  # read for an update; None: other text
        self.spans, self.forced, self.others = [], None, set()  # see plan()
        self.made, self.failed = Counter(), {}  # checks by name; a line for each that failed
        self.last: tuple[T.Read, Tensor] | None = None  # the last read, and what of it was scored
        self.versions, self.bits = self.version(), fingerprint(self.weights)

    def fail(self, check: str, line: str) -> None:
        """Note a violation; the first of its kind is kept."""
        self.failed.setdefault((check, line.split(":")[0]), line)

    def fail_at(self, check: str, line: str, wrong: Tensor) -> None:
        """Note at which positions a rule is broken, if at any."""
        if wrong.any():
            first = int(wrong.int().argmax())
            self.fail(check, f"{line}: {int(wrong.sum())} positions, the first is {first}")

    def version(self) -> int:
        """Returns how often the weights were changed, as far as PyTorch knows."""
        return sum(w._version for w in self.weights)

    def watch(self, bits: bool) -> None:
        """Check that the weights are as they were, by their `bits` too if these are wanted and known."""
        changed = self.version() != self.versions
        if changed or (bits and self.bits is not None and self.bits != fingerprint(self.weights)):
            self.fail("weights", MOVED)
            self.trust(bits)

    def trust(self, bits: bool) -> None:
        """Take the weights as they are now for right."""
        self.versions, self.bits = self.version(), fingerprint(self.weights) if bits else None

    def ends(self, at: Tensor, known: Tensor) -> Tensor:
        """Returns (-first, last + 1) position that is known."""
        if not len(at):
            return self.nothing
        return torch.stack([torch.where(known, end, -self.targets - 1).amax() for end in (-at, at + 1)])

    def record(self, read: T.Read, scored: Tensor, sums: Tensor) -> None:
        """Note scores."""
        if read.scorer.tokens is not self.tokens:
            self.fail("positions", "another text is scored")
        self.number, self.last, chunk = self.number + 1, (read, scored), self.chunk
        index = torch.where(scored, read.at, self.targets).flatten()
        self.count.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        self.nats.index_copy_(0, index, read.losses.detach().flatten().float())
        self.early.index_copy_(0, index, self.early[index] | self.learnt[index])
        self.bytes += sums[2]
        chunk.scored = chunk.scored.maximum(self.ends(read.at, scored))
        if chunk.chosen:
            chunk.on_scores(read, scored, sums)

    def update(self) -> None:
        """Note that the weights learn from what was read since they last did so."""
        self.number += 1
        if not self.material or any(at is None for _, at in self.material):
            self.fail("order", FOREIGN)
        for chunk, at in self.material:
            if at is not None:
                index = torch.where(at < 0, self.targets, at.clamp(max=self.targets))
                self.learnt.index_fill_(0, index.flatten(), True)
                if chunk is self.chunk:
                    chunk.learnt = chunk.learnt.maximum(self.ends(at, at >= 0))
        self.material = []

    def plan(self, mode: Any, s: T.Settings, first: int, choice: random.Random) -> None:
        """Choose the chunks that are replayed, among those from `first` on that score two targets or more."""
        N, C, W = self.targets, s.ttt_chunk_tokens, mode.scorer.window
        if mode.context_chunks:
            edges = [0, *range(W, N, C), N]
        else:  # a window belongs to the chunk of the first target that it scores
            steps = [T.ceil_div(max(low - W, 0), s.eval_stride) for low in range(C, N, C)]
            edges = [0, *(min(N, W + step * s.eval_stride) for step in steps), N]
        self.spans = list(pairwise(edges))
        able = [c for c, (low, high) in enumerate(self.spans) if c >= first and high - low > 1]
        middle = [c for c in able if 0 < c < len(self.spans) - 1]
        self.forced = choice.choice(middle or able) if able else None
        self.others = set(choice.sample(able, min(REPLAYS, len(able))))

    def compare_replay(self, chunk: Chunk) -> None:
        """Check that a chunk got the scores that it got when tokens behind number `last` were others."""
        kept, again, known = chunk.scores, chunk.replay.scores, 0
        if [at.shape for _, at, _ in kept] != [at.shape for _, at, _ in again]:
            self.fail("chunks", f"a chunk is read in another way when its future is another: {chunk.index}")
            kept = again = []
        for (one, at, scored), (other, _, _) in zip(kept, again, strict=True):
            before = scored & (at < chunk.last)
            known += int(before.sum())
            if wrong := differing(one, other, at, before):
                line = f"in chunk {chunk.index}, tokens behind number {chunk.last} change position {wrong[0]}"
                self.fail("chunks", f"a chunk was scored with knowledge of its future: {line}")
        self.made["chunks"] += known > 0
        chunk.scores = chunk.replay = None

    def check_positions(self, score: T.Score, text: Text, before: T.Score) -> None:
        """And totals. A resumed run recorded what gave `before` when it first scored it."""
        N, begun = len(text.tokens) - 1, int(before.tokens)
        if self.targets != N or not np.array_equal(self.tokens.cpu().numpy(), text.tokens):
            self.fail("positions", f"other text than the validation shards', which has {N} targets")
        nats = torch.where(self.count[:-1] > 0, self.nats[:-1], 0).sum(dtype=torch.float64)
        nats, size = T.all_reduce(torch.stack((nats, self.bytes))).tolist()
        count = T.all_reduce(self.count[:-1].clone())
        count[:begun] += 1
        self.fail_at("positions", "never scored", count == 0)
        self.fail_at("positions", "scored twice", count > 1)
        recorded = values_of(T.Score(nats + before.nats, int(count.sum()), size + before.bytes))
        for what, value in values_of(score).items():
            if not abs(value - recorded[what]) <= TOTAL_TOLERANCE * abs(recorded[what]):
                line = f"{what} of the score are not those recorded: {value:.10g}, not {recorded[what]:.10g}"
                self.fail("totals", line)
        self.made += Counter(positions=(N - begun) * (T.rank() == 0), totals=1)

    def check_order(self) -> list[list]:
        """Returns of each chunk: `number`, index, targets [low, high) scored and learnt from, epochs."""
        self.fail_at("order", EARLY, self.early[:-1])
        ends = torch.stack([torch.cat((chunk.scored, chunk.learnt)) for chunk in self.chunks])
        if T.world_size() > 1:
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        rows, behind = [], None
        for chunk, span in zip(self.chunks, ends.tolist(), strict=True):
            scored, learnt = ([-low, high] if high > 0 else None for low, high in (span[:2], span[2:]))
            rows.append([chunk.number, chunk.index, scored, learnt, chunk.epochs])
            if scored:
                if behind not in (None, scored[0]):
                    line = f"{chunk.index} begins at position {scored[0]}, not {behind}"
                    self.fail("order", f"chunks out of order: {line}")
                behind = scored[1]
            if learnt and learnt[1] > (behind or 0):
                self.fail("order", f"{EARLY}: chunk {chunk.index} learns up to position {learnt[1] - 1}")
        return rows


# ======== The audit ========


class Audit(T.Hooks):
    """Watches a run's scoring and tells at its end what breaks the rules. `whole_text`: decode all of it."""

    def __init__(self, s: T.Settings, *, whole_text: bool = False) -> None:
        self.s, self.whole_text = s, whole_text
        self.evaluation: T.Evaluation | None = None
        self.busy = False  # what happens now is the audit's doing
        self.stage: Stage | None = None  # the present one
        self.stages: dict[str, dict[str, Any]] = {}
        self.failed: list[tuple[str, str]] = []  # (check, line)
        self.spent = 0.0

    @contextmanager
    def aside(self, wait: bool = True) -> Iterator[None]:
        """Spend time that is not scoring's, and watch nothing meanwhile."""
        clock, self.busy = self.evaluation.clock, True
        begin = clock.seconds(wait)
        try:
            yield
        finally:
            spent = clock.seconds(wait) - begin
            clock.apart, self.spent, self.busy = clock.apart + spent, self.spent + spent, False

    def affordable(self) -> bool:
        """Returns whether there is time for a check."""
        return self.spent <= BUDGET * (time.perf_counter() - self.start)

    def watched(self) -> Stage | None:
        """Returns the present stage if this is the program's doing; it begins with what happens first."""
        if self.evaluation is None or self.busy:
            return None
        if self.stage is None:
            with self.aside():
                self.stage = Stage(self.evaluation.ttt.mode.scorer)
                if self.stage.bits != self.bits and not self.resumed:
                    self.stage.fail("weights", "the stage does not start from the artifact's weights")
        return self.stage

    @property
    def resumed(self) -> bool:
        """Whether test-time training goes on from a checkpoint."""
        return bool(self.s.resume and self.evaluation.ttt.records)

    # What happens

    def on_scoring(self, evaluation: T.Evaluation) -> None:
        """Begin. Raises RunError, OSError."""
        self.evaluation, self.start, run = evaluation, time.perf_counter(), evaluation.run_of
        with self.aside():
            self.s, scorer = run.settings, evaluation.ttt.mode.scorer
            self.seed = T.from_rank0(secrets.randbits(32))
            self.shared, self.own = random.Random(self.seed), random.Random(f"{self.seed} {T.rank()}")
            paths = {"artifact": run.artifact_path, "code": Path(T.__file__)}  # other nodes lack them
            files = T.together(lambda: {name: digest(path) for name, path in paths.items()}, 1)
            self.files = T.from_rank0(files)
            self.text = Text(self.s, scorer.tables, self.shared)
            self.bits = fingerprint(list(scorer.model.parameters()))
        openings().paths = []

    def on_read(self, read: T.Read) -> None:
        """Note what an update may learn from."""
        if (stage := self.watched()) and read.losses.requires_grad:
            at = read.at if read.scorer.tokens is stage.tokens else None
            stage.material.append((stage.chunk, at))

    def on_scores(self, read: T.Read, scored: Tensor, sums: Tensor) -> None:
        """Note the scores, and repeat the read if that is due."""
        if stage := self.watched():
            chunk = stage.chunk
            with self.aside(wait=False):
                stage.watch(bits=False)
                scored = scored & (read.at >= 0) & (read.at < stage.targets)
                stage.record(read, scored, sums)
            if not stage.chunks:
                chunk.unread = self.own.random() < READS_CHECKED and self.affordable()
            if chunk.unread:
                with self.aside():
                    chunk.unread = not self.check_read(stage, read, scored)

    def on_chunk_start(self, ttt: T.TestTimeTraining, chunk: int) -> None:
        """Perhaps score the chunk ahead, with another future."""
        if stage := self.watched():
            with self.aside(wait=False):
                if not stage.chunks:
                    stage.plan(ttt.mode, self.s, chunk, self.shared)
                stage.watch(bits=False)
                span = stage.spans[min(chunk, len(stage.spans) - 1)]
                stage.chunk = Chunk(chunk, span, stage.number, stage.nothing)
                stage.chunks.append(stage.chunk)
                chosen = chunk == stage.forced
                if chunk in stage.others and not chosen:
                    chosen = T.from_rank0(self.affordable())
                stage.chunk.chosen = stage.chunk.unread = chosen
            if chosen:
                with self.aside():
                    stage.watch(bits=True)
                    self.replay(stage, ttt)

    def before_update(self, learner: T.Learner) -> None:
        """Note an update and what it learns from."""
        if stage := self.watched():
            with self.aside(wait=stage.chunk.chosen):
                stage.watch(bits=stage.chunk.chosen)
                stage.update()

    def on_update(self, learner: T.Learner) -> None:
        """From here on the weights are others."""
        if stage := self.watched():
            with self.aside(wait=stage.chunk.chosen):
                stage.trust(bits=stage.chunk.chosen)

    def on_chunk(self, ttt: T.TestTimeTraining) -> None:
        """Compare the chunk's scores with those of its replay."""
        if stage := self.watched():
            chunk = stage.chunk
            with self.aside(wait=chunk.chosen):
                chunk.epochs = ttt.records[-1][1]
                stage.watch(bits=chunk.chosen)
                if chunk.chosen:
                    stage.compare_replay(chunk)

    def on_stage(self, name: str, score: T.Score) -> None:
        """Check all that was recorded of a stage."""
        if stage := self.watched():
            with self.aside():
                values = self.stages[name] = values_of(score)
                if not stage.chunks and stage.last and not stage.made["reads"]:
                    self.check_read(stage, *stage.last)
                stage.watch(bits=True)
                stage.made += Counter(weights=1, order=1)
                stage.check_positions(score, self.text, self.scored_before(stage))
                if stage.chunks:
                    values["chunks"] = stage.check_order()
                self.check_bytes(stage, score)
                self.sum_up(stage, name)
                self.stage = None

    def on_end(self) -> None:
        """Write and log what was found. Raises RunError if that breaks a rule."""
        run, found = self.evaluation.run_of, self.finish()
        log, path = run.log, run.log_path.with_suffix(".audit.json")
        data = (json.dumps(found) + "\n").encode()
        T.together(lambda: T.write_atomically(path, data), 1)
        violations = found["violations"]
        log.event("audit", violations=len(violations), share=found["share"])
        if violations:
            raise T.RunError("audit: " + "; ".join(violations))

    # Checks while it scores

    def check_read(self, stage: Stage, read: T.Read, scored: Tensor) -> bool:
        """Repeat a read, with other tokens behind a random one and with all tokens in place of a random one.

        Returns False if it scored nothing. Processes that share the positions of a read do this together,
        each at its last position in the text.
        """
        at, choice, chunk = read.at, self.own, stage.chunk
        if read.ranks > 1:
            row, column, choice = 0, int((at[0] < stage.targets).sum()) - 1, self.shared
            last = choice.randint(min(chunk.low + 1, chunk.high - 1), chunk.high - 1)
        elif scored.any():
            places = scored.nonzero()
            row, column = places[choice.randrange(len(places))].tolist()
            last = max(int(at[row, column]), int(at.min()) + 1)
        else:
            return False
        tokens = replaced(read.scorer.tokens, last, self.s.vocab_size, choice)
        with torch.set_grad_enabled(read.losses.requires_grad):
            again = read_again(read, at, read.cache, tokens=tokens)
        known = (at >= 0) & (at < last)
        if wrong := differing(again, read.losses, at, known):
            line = f"those behind number {last} change the score of position {wrong[0]}"
            stage.fail("reads", f"a later token was read: {line}")
        stage.made["reads"] += bool(known.any())
        self.check_sum(stage, read, row, column)
        return True

    @torch.no_grad()
    def check_sum(self, stage: Stage, read: T.Read, row: int, column: int) -> None:
        """Read all tokens in place of the target at a row and column.

        Positions behind it read it again, since the rotary base depends on the length. A process whose part
        of a shared read is behind the text (column -1) only takes part.
        """
        tokens, once = read.scorer.tokens.clone(), LogitsOnce(read.scorer.model)
        model = variant(read.scorer.model, _compiled_call_impl=None, logits=once)
        at, cache = read.at[row : row + 1], read.cache and lane_of(read.cache, row)
        if column < 0:
            read_again(read, at, cache, tokens=tokens, model=model)
            return
        p, losses = int(at[0, column]), []
        for token in range(self.s.vocab_size):
            tokens[p + 1] = token
            losses.append(read_again(read, at.clamp(max=p), cache, tokens=tokens, model=model)[0, column])
            if once.reads > 1:
                stage.fail("sums", f"a target was read before it was scored: that of position {p}")
                return
        losses = torch.stack(losses).double()
        total, real = float(losses.neg().exp().sum()), float(losses[read.scorer.tokens[p + 1]])
        recorded = float(read.losses[row, column])
        if not abs(total - 1) <= SUM_TOLERANCE:
            line = f"those of all tokens after position {p} to {total:.6f}"
            stage.fail("sums", f"probabilities do not sum to 1: {line}")
        tolerance = 1e-3 if read.matrices[0].dtype == torch.float32 else 0.25  # compiled: other roundings
        if not abs(real - recorded) <= tolerance:
            line = f"position {p} has {recorded:.4f} nats, with nothing behind it {real:.4f}"
            stage.fail("sums", f"a score is not that of its context alone: {line}")
        stage.made["sums"] += 1

    def replay(self, stage: Stage, ttt: T.TestTimeTraining) -> None:
        """Score the present chunk ahead, with other tokens behind a random one, and put everything back."""
        chunk, learner = stage.chunk, ttt.learner
        chunk.replay = copy.deepcopy(chunk)
        middle, end = (chunk.low + chunk.high) // 2 + 1, chunk.high - 1
        chunk.last = self.shared.randint(min(middle, end), end)
        state = copy.deepcopy(learner.state_dict())
        tokens = replaced(stage.tokens, chunk.last, self.s.vocab_size, self.shared)
        scorer = variant(ttt.mode.scorer, tokens=tokens, hooks=chunk.replay)
        mode = variant(ttt.mode, scorer=scorer, learner=variant(learner, hooks=T.NO_HOOKS))
        mode.score_chunk(chunk.index)
        now, before = tensors_of(learner.state_dict()), tensors_of(state)
        if len(now) != len(before) or not all(map(torch.equal, now, before)):
            learner.load_state_dict(state)
        stage.trust(bits=True)

    # Checks at the end

    def scored_before(self, stage: Stage) -> T.Score:
        """Returns what the chunks gave that were done before the run was resumed."""
        if not stage.chunks or not self.s.resume:
            return T.Score()
        sums = [sums for sums, _ in self.evaluation.ttt.records[: stage.chunks[0].index]]
        return T.Score(*torch.stack(sums).sum(0).tolist()) if sums else T.Score()

    def check_bytes(self, stage: Stage, score: T.Score) -> None:
        """Compare the bytes with those of the text, as far as there is time."""
        text, made, now = self.text, stage.made, time.perf_counter()
        if score.bytes != text.bytes:
            line = f"{score.bytes:.0f}, not {text.bytes:.0f}"
            stage.fail("bytes", f"other bytes than the whole text's: {line}")
        made["bytes"] += 1
        end = now + DECODING * (now - self.start)
        while text.pieces and (not made["documents"] or self.whole_text or time.perf_counter() < end):
            low, high = text.pieces.pop()
            start, size = text.decode(low, high)
            if size is not None and size != text.count(start, high):
                line = f"{text.count(start, high)}, not {size}, from token {start} on"
                stage.fail("bytes", f"a document's bytes are not those of its text: {line}")
            made["undecodable" if size is None else "documents"] += 1

    def sum_up(self, stage: Stage, name: str) -> None:
        """Put together what all processes have found in a stage."""
        failures = [(check, f"{name}: {line}") for (check, _), line in stage.failed.items()]
        every = gather((failures, stage.made))
        made = sum((made for _, made in every), Counter())
        self.stages[name]["checks"] = dict(made)
        no_occasion = {"files"} if stage.chunks else {"files", "chunks"}
        if stage.chunks and stage.forced is None:
            no_occasion |= {"chunks", "reads", "sums"}
        never = [check for check in CHECKS if not made[check] and check not in no_occasion]
        self.failed += [failure for failures, _ in every for failure in failures]
        self.failed += [(check, f"{name}: was never checked: {check}") for check in never]

    def finish(self) -> dict[str, Any]:
        """Returns what was found, the same on every process. From here on nothing is watched."""
        elapsed, s, model = time.perf_counter() - self.start, self.s, self.evaluation.model
        opened, openings().paths = openings().paths, None
        stages = {name: values_of(T.Score(*score)) for name, score in self.evaluation.scores.items()}
        if not s.resume:
            unseen = [name for name in stages if name not in self.stages]
            self.failed += [("positions", f"{name}: nothing of it was recorded") for name in unseen]
        self.evaluation = None
        if any(is_forbidden(path, s) for path in still_open()):
            gc.collect()  # what nobody uses any more
        files = dict.fromkeys(opened, "was opened") | dict.fromkeys(still_open(), "is still open")
        wrong = [f"a file of no use to scoring {how}: {p}" for p, how in files.items() if is_forbidden(p, s)]
        system = (sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys")
        here = os.getcwd() + os.sep
        own = {path.removeprefix(here) for path in opened if not path.startswith(system)}
        every = gather((wrong, own, self.spent / elapsed))
        failed = self.failed + [("files", line) for wrong, _, _ in every for line in wrong]
        return {
            "violations": list(dict.fromkeys(line for _, line in failed)),
            "failed": sorted({check for check, _ in failed}),
            "share": max(share for *_, share in every),
            "seconds": elapsed,
            "seed": self.seed,
            "processes": T.world_size(),
            "hashes": {name: sha256 for name, (sha256, _) in self.files.items()},
            "sizes": {name: size for name, (_, size) in self.files.items()},
            "versions": {name: version(name) for name in ("torch", "numpy", "sentencepiece")},
            "python": platform.python_version(),
            "stages": stages | self.stages,
            "opened": sorted(set().union(*(own for _, own, _ in every))),
            "settings": {name: T.show(getattr(model.s, name.lower())) for name in T.FIELDS},
        }
