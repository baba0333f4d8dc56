"""Checks scoring against the challenge's rules while a run scores (AUDIT=1). Checks by name:

    positions  Each stage scores each target of the validation shards' text exactly once.
    order      An update learns from targets scored before; chunks follow each other without gap or overlap.
    weights    Nothing changes them but an update, or going back to the artifact's, with which stages start.
    sums       Of some targets all tokens' probabilities sum to 1, and the target's is the one recorded.
    reads      Some reads are repeated with all tokens behind a random one replaced: bitwise the same before;
               and with all before its document replaced, if documents are apart: bitwise the same in it.
    chunks     So are some chunks of test-time training, from the weights before them.
    mixture    Of experts, each checked as a stage by itself, weights follow from the scores before, sum to 1
               and make the scores that count of those recorded; with other scores behind, bitwise the same.
               What n-grams say of some targets is counted again, in the tokens before them only; with other
               tokens behind, bitwise the same.
    bytes      Those of a score are the whole text's; those of some documents are what SentencePiece decodes.
    totals     Score, val_loss and val_bpb are those of what was recorded.
    files      No training shard, nor what else is beside the validation shards, is opened or mapped.

What is repeated is the program's own computation. Each check is made at least once a stage, and more often,
at random, while all take less than 3% of the time. Scores are bitwise those without an audit, unless
test-time training has to save time.
"""

import copy
import gc
import hashlib
import json
import math
import os
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import train_gpt as T

BUDGET, DECODING = 0.03, 0.01  # of the time of scoring: for all, for decoding documents
CHECKS = ("positions", "order", "weights", "sums", "reads", "chunks", "mixture", "bytes", "totals", "files")
REPEATED = 0.25  # of chunks, and of reads without chunks, while there is time
PIECE = 4096  # most tokens of a document that are decoded at once
SUM_TOLERANCE, TOTAL_TOLERANCE = 1e-4, 1e-9  # of a sum of probabilities; of a total, relative
BLOCKS, PLACES = 3, 20  # of a mixture that are made again; targets whose n-grams are counted again
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of nats, since compiled code rounds otherwise
MOVED = "the weights changed outside an update"
FOREIGN = "the weights learn from what is no part of the text that is scored"


# ======== Small parts ========


def with_others(scorer: T.Scorer, changed: slice, choice: random.Random) -> T.Scorer:
    """Returns an unwatched scorer of a text with other tokens in a slice.

    Documents stay as long as they are where attention looks at that, or sums would be of another order.
    """
    tokens, model, window = scorer.tokens, scorer.model, scorer.window
    generator = torch.Generator(tokens.device).manual_seed(choice.getrandbits(62))
    shift = torch.zeros_like(tokens)
    shift[changed].random_(1, model.s.vocab_size, generator=generator)
    others = (tokens + shift) % model.s.vocab_size
    if model.s.document_attention:
        others = torch.where((tokens == T.BOS) | (others == T.BOS), tokens, others)
    return type(scorer)(model, others, scorer.tables, window, scorer.batch * window)


def fingerprint(model: T.GPT) -> int:
    """Returns a sum of the bits of its weights."""
    return int(sum(w.detach().view(torch.int32).sum(dtype=torch.int64) for w in model.parameters()))


def values_of(score: T.Score) -> dict[str, float]:
    """Returns a score by name."""
    return score._asdict() | {"val_loss": score.val_loss, "val_bpb": score.val_bpb}


def scored_so_far(ttt: T.TestTimeTraining) -> T.Score:
    """Returns the score of the chunks that are done."""
    sums = [sums for sums, _ in ttt.records]
    return T.Score(*torch.stack(sums).sum(0).tolist()) if sums else T.Score()


def is_forbidden(path: str, s: T.Settings) -> bool:
    """Returns whether a file is what scoring has no business with."""
    path, data, tokenizer = map(os.path.realpath, (path, s.data_path, s.tokenizer_path))
    folder, name = os.path.split(path)
    beside = folder == data and not name.startswith("fineweb_val_") and path != tokenizer
    return beside or name.startswith("fineweb_train_")


@cache
def files_opened() -> list[str]:
    """Returns the list, kept up to date, of files that this process opens since it was first asked for."""
    paths = []

    def note(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            paths.append(os.path.abspath(os.fsdecode(args[0])))

    sys.addaudithook(note)
    return paths


def still_open() -> list[str]:
    """Returns the paths of files, no pipes or sockets, that are open or mapped; Linux tells."""
    if not os.path.exists("/proc/self/maps"):
        return []
    paths = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    maps = Path("/proc/self/maps").read_text("utf-8", errors="replace").split("\n")
    paths += [line.split(maxsplit=5)[5] for line in maps if " /" in line]
    return [path for path in paths if os.path.isfile(path)]


class Text:
    """The validation text, as it is on disk. Raises RunError, OSError."""

    def __init__(self, s: T.Settings, tables: T.ByteTables, choice: random.Random) -> None:
        paths = sorted(Path(s.data_path).glob("fineweb_val_*.bin"))
        ids = np.concatenate([np.fromfile(path, "<u2", offset=T.HEADER_BYTES) for path in paths])
        self.tokenizer, self.tables = T.load_tokenizer(s.tokenizer_path, s.vocab_size)[0], tables
        self.is_boundary = tables.is_boundary.cpu().numpy()
        self.tokens = torch.from_numpy(ids.astype(np.int32)).to(tables.base_bytes.device)
        self.bytes = self.count(1, len(ids))
        documents = (np.flatnonzero(self.is_boundary[ids]) + 1).tolist()
        pieces = list(pairwise(sorted({1, len(ids), *range(PIECE, len(ids), PIECE), *documents})))
        choice.shuffle(pieces)
        self.pieces = pieces[T.rank() :: T.world_size()]  # [low, high) of one document each

    def count(self, low: int, high: int) -> int:
        """Returns the bytes of tokens [low, high) by the program's tables."""
        tokens = self.tokens[low - 1 : high].long()
        return int(self.tables.count(tokens[:-1], tokens[1:]).sum())

    def decode(self, low: int, high: int) -> int | None:
        """Returns the bytes of tokens [low, high) behind the one before; None if a character is cut."""
        tokens = self.tokens[low - 1 : high].tolist()
        parts = ([t for t in part if not self.is_boundary[t]] for part in (tokens, tokens[:1]))
        whole, before = map(self.tokenizer.decode, parts)
        return None if "\ufffd" in whole + before else len(whole.encode()) - len(before.encode())


# ======== What is known of a stage ========


class Stage(T.Hooks):
    """What one process has recorded of a stage.

    Of each target, and of one more that is none: `count` of scores, `nats`, the number of the chunk or
    update before it was `scored`, and of the update that first `learnt` from it. `alone`: this process's own.
    """

    def __init__(self, scorer: T.Scorer, *, alone: bool = False) -> None:
        self.alone = alone
        self.tokens, self.targets, device = scorer.tokens, scorer.targets, scorer.tokens.device
        self.model, size = scorer.model, self.targets + 1
        self.count, self.scored = torch.zeros(2, size, dtype=torch.int32, device=device)
        self.learnt, self.nats = torch.full_like(self.count, 2**31 - 1), torch.zeros_like(self.count).double()
        self.number = 0  # of chunks begun and updates made, on all processes
        self.chunks = []  # number, index, epochs of each
        self.before = T.Score()  # of what was scored before the run was resumed
        self.material = []  # positions read since the last update, to learn
        self.replay, self.last = None, 0  # the chunk with other tokens behind number `last`
        self.due = True  # the next read is to be repeated
        self.made, self.failed = Counter(), {}  # how often by check; line by kind of violation
        self.trust(bits=True)

    def trust(self, bits: bool) -> None:
        """Take the weights as they are for right ones; `bits`: be able to tell a change unseen by PyTorch."""
        self.versions, self.bits = self.version(), fingerprint(self.model) if bits else None

    def check_weights(self, bits: bool = False) -> None:
        """Note if the weights are others than those trusted, by their `bits` too if these are known."""
        if self.version() != self.versions or (bits and self.bits not in (None, fingerprint(self.model))):
            self.fail("weights", MOVED)
            self.trust(bits)

    def fail(self, check: str, line: str) -> None:
        """Note a violation, the first of its kind."""
        self.failed.setdefault((check, line.split(":")[0]), line)

    def fail_at(self, check: str, line: str, wrong: Tensor) -> None:
        """Note at which positions a rule is broken, if at any."""
        if wrong.any():
            first = int(wrong.int().argmax())
            self.fail(check, f"{line}: {int(wrong.sum())} positions, the first is {first}")

    def version(self) -> int:
        """Returns how often PyTorch has seen weights change."""
        return sum(w._version for w in self.model.parameters())

    def on_scores(self, read: T.Read, scored: Tensor, sums: Tensor) -> None:
        """Note scores."""
        if read.scorer.tokens is not self.tokens:
            self.fail("positions", "another text is scored")
        index = torch.where(scored, read.at, self.targets).flatten()
        self.count.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        self.nats.index_copy_(0, index, read.losses.detach().flatten().double())
        self.scored.index_fill_(0, index, self.number)

    def total(self, values: Tensor) -> Tensor:
        """Returns a sum over all processes, or this one's own values."""
        return values.clone() if self.alone else T.all_reduce(values.clone())

    def update(self) -> None:
        """Note that the weights learn from what was read since the last update."""
        self.number += 1
        if not self.material:
            self.fail("order", FOREIGN)
        for at in self.material:
            index = at.clamp(0, self.targets).flatten()
            self.learnt.index_copy_(0, index, self.learnt[index].clamp(max=self.number))
        self.material = []

    def check_positions(self, score: T.Score, text: Text) -> None:
        """And totals."""
        begun = int(self.before.tokens)
        if not torch.equal(self.tokens, text.tokens):
            self.fail("positions", "other text than the validation shards'")
        count = self.total(self.count[:-1])
        count[:begun] += 1
        self.fail_at("positions", "never scored", count == 0)
        self.fail_at("positions", "scored twice", count > 1)
        nats = self.total(self.nats[:-1].sum()).item()
        recorded = values_of(T.Score(nats + self.before.nats, int(count.sum()), text.bytes))
        for what, value in values_of(score).items():
            if not abs(value - recorded[what]) <= TOTAL_TOLERANCE * abs(recorded[what]):
                line = f"{what} of the score are not those recorded"
                self.fail("totals", f"{line}: {value:.10g}, not {recorded[what]:.10g}")
        self.made["positions"] = (self.targets - begun) * (T.rank() == 0 or self.alone)

    def check_order(self) -> list[list]:
        """Returns of each chunk: number, index, how many targets it scores and learns from, epochs."""
        scored, learnt = self.total(self.scored[:-1]), self.learnt[:-1]
        if T.world_size() > 1 and not self.alone:
            dist.all_reduce(learnt, dist.ReduceOp.MIN)
        self.fail_at("order", "adapted on before it was scored", learnt <= scored)
        numbers = [number for number, *_ in self.chunks]
        edges = torch.tensor([*numbers, self.number + 1], device=scored.device)
        own, by = (torch.bucketize(number, edges, right=True) for number in (scored, learnt))  # chunk + 1
        self.fail_at("order", "chunks out of order", own[1:] < own[:-1])
        by.masked_fill_(by > own, 0)  # no chunk learns from one before it
        sizes = [chunk.bincount(minlength=len(edges) + 1)[1:-1].tolist() for chunk in (own, by)]
        return [[n, i, *both, epochs] for (n, i, epochs), *both in zip(self.chunks, *sizes, strict=True)]


# ======== The audit ========


class Audit(T.Hooks):
    """Watches scoring and tells at its end what breaks the rules. `whole_text`: decode all of it."""

    def __init__(self, s: T.Settings, *, whole_text: bool = False) -> None:
        self.s, self.whole_text = s, whole_text
        self.evaluation = self.stage = None  # what is watched; the present Stage
        self.apart = 0.0  # seconds of its own, which are not scoring's
        self.nats, self.experts = {}, {}  # of each of this rank's experts: what it said, (N,); values
        self.made = Counter()  # checks of experts
        self.stages, self.failed = {}, []  # values by stage; check and line of violations

    @contextmanager
    def aside(self, wait: bool = True) -> Iterator[None]:
        """Take time that is not scoring's."""
        wait = wait and torch.cuda.is_initialized()
        if wait:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        if wait:
            torch.cuda.synchronize()
        spent = time.perf_counter() - begin
        self.evaluation.clock.add(-spent)
        self.apart += spent

    def affordable(self) -> bool:
        """Returns whether there is time for a check."""
        return self.apart <= BUDGET * (time.perf_counter() - self.start)

    def watched(self, ttt: T.TestTimeTraining | None = None) -> Stage | None:
        """Returns the present stage, begun by what happens first, if that is a chunk, of `ttt`."""
        if self.evaluation is None:
            return None
        if self.stage is None:
            with self.aside():
                alone = ttt is not None and isinstance(ttt.mode, T.StreamingMode)
                self.stage = Stage(self.evaluation.scorer, alone=alone)
                if ttt is not None:
                    mode, self.stage.before = ttt.mode, scored_so_far(ttt) if self.s.resume else T.Score()
                    learnt = range(mode.context_chunks, mode.chunks - 1) or range(mode.chunks)
                    self.stage.middle = self.choice().choice(learnt)  # a chunk that is learnt from, if any
                if not self.stage.before.tokens and self.stage.bits != self.bits:
                    self.stage.fail("weights", "the stage does not start from the artifact's weights")
        self.stage.check_weights()
        return self.stage

    def choice(self) -> random.Random:
        """Returns the source of random numbers that all who take part in the stage have."""
        return self.own if self.stage.alone else self.shared

    def on_scoring(self, evaluation: T.Evaluation) -> None:
        """Begin. Raises RunError, OSError."""
        self.evaluation, self.start, run = evaluation, time.perf_counter(), evaluation.run_of
        with self.aside():
            self.s, scorer = run.settings, evaluation.scorer
            self.seed = T.from_rank0(secrets.randbits(32))
            self.shared, self.own = random.Random(self.seed), random.Random(f"{self.seed} {T.rank()}")
            paths = run.artifact_path, Path(T.__file__)  # other nodes lack the first
            data = T.together(lambda: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths], 1)
            self.hashes = dict(zip(("artifact", "code"), T.from_rank0(data), strict=True))
            self.text, self.bits = Text(self.s, scorer.tables, self.shared), fingerprint(scorer.model)
        files_opened().clear()

    def on_read(self, read: T.Read) -> None:
        """Note what an update may learn from."""
        if (stage := self.watched()) and read.losses.requires_grad:
            stage.material.append(read.at)
            if read.scorer.tokens is not stage.tokens:
                stage.fail("order", FOREIGN)

    def on_scores(self, read: T.Read, scored: Tensor, sums: Tensor) -> None:
        """Note the scores, and repeat the read if that is due."""
        if stage := self.watched():
            with self.aside(wait=False):
                stage.on_scores(read, scored, sums)
            if read.matrices is None:  # of a mixture
                return
            if not stage.chunks and self.own.random() < REPEATED:
                stage.due = stage.due or self.affordable()
            if stage.due:
                with self.aside():
                    stage.due = not self.check_read(stage, read, scored)

    def on_chunk_start(self, ttt: T.TestTimeTraining, chunk: int) -> None:
        """Perhaps score the chunk ahead, with another future."""
        if stage := self.watched(ttt):
            with self.aside(wait=False):
                stage.number += 1
                stage.chunks.append([stage.number, chunk, 0])
                stage.due, chosen = False, stage.made["chunks"] <= (chunk >= stage.middle)
                if self.choice().random() < REPEATED and not chosen:
                    chosen = self.affordable() if stage.alone else T.from_rank0(self.affordable())
            if chosen:
                with self.aside():
                    self.replay(stage, ttt)

    def before_update(self, learner: T.Learner) -> None:
        """Note an update and what it learns from."""
        if stage := self.watched():
            with self.aside(wait=stage.replay is not None):
                stage.check_weights(bits=stage.replay is not None)
                stage.update()

    def on_update(self, learner: T.Learner) -> None:
        """From here on the weights are others."""
        if stage := self.stage:
            with self.aside(wait=stage.replay is not None):
                stage.trust(bits=stage.replay is not None)

    def on_forget(self, learner: T.Learner) -> None:
        """See that weights are the artifact's again."""
        if stage := self.stage:
            with self.aside(wait=False):
                if fingerprint(stage.model) != self.bits:
                    stage.fail("weights", "what was learnt is not forgotten")
                stage.trust(bits=stage.replay is not None)

    def on_chunk(self, ttt: T.TestTimeTraining) -> None:
        """Compare the chunk's scores with those of its replay."""
        if stage := self.watched():
            stage.chunks[-1][-1] = ttt.records[-1][1]
            if again := stage.replay:
                with self.aside():
                    wrong = ((again.count > 0) & (again.nats != stage.nats))[: stage.last]
                    stage.fail_at("chunks", "a chunk was scored with knowledge of its future", wrong)
                    stage.check_weights(bits=True)
                    stage.replay = None

    def on_expert(self, ttt: T.TestTimeTraining) -> None:
        """Check what was recorded of an expert."""
        if stage := self.watched(ttt):
            with self.aside():
                (name,) = self.evaluation.ttt.now
                score = scored_so_far(ttt)
                stage.check_positions(score, self.text)
                self.experts[name] = values_of(score) | {"chunks": stage.check_order()}
                self.nats[name] = stage.nats[:-1].cpu()
                self.nats[name][: int(stage.before.tokens)] = torch.nan  # of before the run was resumed
                if not {"sums", "chunks"} <= stage.made.keys():
                    stage.fail("sums", "nothing was checked")
                self.keep(stage, f"expert {name}")
                self.made.update(stage.made)
                self.stage = None

    def on_mixture(
        self, ensemble: T.Ensemble, members: dict[str, Tensor], mixed: Tensor, weights: Tensor
    ) -> None:
        """Check a mixture's weights and scores."""
        if stage := self.watched():
            with self.aside():
                losses, experts = torch.stack([*members.values()]), len(ensemble.done)
                for name, row in ensemble.done.items():
                    said = self.nats.get(name, row.cpu().double())
                    wrong = ~said.isnan() & (said != row.cpu().double())
                    stage.fail_at("mixture", f"scores are not those of expert {name}", wrong)
                wrong = (weights.sum(dim=0) - 1).abs() > TOTAL_TOLERANCE
                stage.fail_at("mixture", "weights do not sum to 1", wrong)
                self.check_blocks(stage, losses, mixed, weights)
                if experts < len(losses):
                    base = T.mix(losses[:experts], self.s.ttt_share, self.s.ttt_share_tokens)
                    self.check_blocks(stage, losses[:experts], *base)
                    self.check_caches(stage, losses[experts:], base[0])
                self.check_future(stage, losses, mixed)
                stage.made["mixture"] += 1

    def check_blocks(self, stage: Stage, losses: Tensor, mixed: Tensor, weights: Tensor) -> None:
        """Make some blocks of a mixture again."""
        blocks = range(0, stage.targets, T.BLOCK)
        for low in self.own.sample(blocks, min(BLOCKS, len(blocks))):
            own = slice(low, low + T.BLOCK)
            self.check_block(stage, low, losses[:, own], mixed[own], weights[:, own])

    def check_block(self, stage: Stage, low: int, losses: Tensor, mixed: Tensor, weights: Tensor) -> None:
        """Make a block's weights and scores again, target by target."""
        s, number = self.s, len(losses)
        now = average = np.full(number, 1 / number)
        for i, column in enumerate(losses.double().T.cpu().numpy()):
            joint = now * np.exp(-column)
            right = np.allclose(now, weights[:, i].cpu(), 1e-6, 1e-9)
            if not right or not math.isclose(-math.log(joint.sum()), mixed[i].item(), rel_tol=1e-9):
                line = f"weights or scores are not those of past posteriors: from {low + i} on"
                return stage.fail("mixture", line)
            posterior = joint / joint.sum()
            average = average + (posterior - average) / s.ttt_share_tokens
            now = (1 - s.ttt_share) * posterior + s.ttt_share * average
        return None

    def check_caches(self, stage: Stage, caches: Tensor, base: Tensor) -> None:
        """Count again what some targets' n-grams are, and all of them with other tokens behind a random one.

        `caches` (strengths, N) and `base` (N,), on which they build, are losses.
        """
        tokens = stage.tokens.long()
        for t in self.own.sample(range(stage.targets), min(PLACES, stage.targets)):
            own = self.counted(tokens[: t + 1], tokens[t + 1], base[t])
            if not torch.allclose(own, caches[:, t], 1e-9, 1e-9):
                stage.fail("mixture", f"n-grams are not those of the tokens before: at position {t}")
        place = self.own.randint(stage.targets // 4, stage.targets // 2)
        others = with_others(self.evaluation.scorer, slice(place + 1, None), self.own).tokens
        later = torch.cat((base[:place], base[place:].flip(0)))
        again = T.cache_losses(others, later, self.s.ttt_cache)
        wrong = (again != caches).any(dim=0)[:place]
        stage.fail_at("mixture", "n-grams knew a later token", wrong)

    def counted(self, past: Tensor, target: Tensor, loss: Tensor) -> Tensor:
        """Returns n-grams' losses (strengths,) for a target behind tokens (t,); `loss`: the model's."""
        strength = torch.tensor(T.STRENGTHS, dtype=torch.float64, device=past.device)
        p, document = (-loss).exp(), int((past == T.BOS).nonzero()[-1:].sum())
        for begin, least in ((0, 2), (document, 1)):
            for k in range(least, self.s.ttt_cache + 1):
                last = F.pad(past, (k - 1, 0))  # as if zeros stood before the text
                same = (last.unfold(0, k, 1)[begin:-1] == last[-k:]).all(dim=1)
                behind = past[begin + 1 :][same]
                if len(behind):
                    backing = strength * len(behind.unique())
                    p = ((behind == target).sum() + backing * p) / (len(behind) + backing)
        return -p.log().expand(len(strength))

    def check_future(self, stage: Stage, losses: Tensor, mixed: Tensor) -> None:
        """Mix again with other scores behind a random place in the second quarter."""
        place = self.own.randint(losses.size(1) // 4, losses.size(1) // 2)
        others = torch.cat((losses[:, :place], 10 * losses[:, place:].roll(1, dims=0)), dim=1)
        again, _ = T.mix(others, self.s.ttt_share, self.s.ttt_share_tokens)
        stage.fail_at("mixture", "a later score was known", again[:place] != mixed[:place])

    def keep(self, stage: Stage, name: str) -> None:
        """Keep a stage's violations."""
        self.failed += [(check, f"{name}: {line}") for (check, _), line in stage.failed.items()]

    def on_stage(self, name: str, score: T.Score) -> None:
        """Check what was recorded of a stage."""
        if stage := self.watched():
            with self.aside():
                values = values_of(score)
                if not stage.chunks and fingerprint(stage.model) != self.bits:
                    stage.fail("weights", MOVED)
                stage.check_positions(score, self.text)
                if stage.chunks:
                    values["chunks"] = stage.check_order()
                self.check_bytes(stage, score)
                if name == "legal_ttt" and self.s.ttt_experts:
                    values["experts"] = {k: v for own in T.gather(self.experts) for k, v in own.items()}
                    stage.made.update(self.made)
                made = values["checks"] = dict(sum(T.gather(stage.made), Counter()))
                if "sums" not in made and ("chunks" in made or not stage.chunks):
                    stage.fail("sums", "nothing was checked")
                self.keep(stage, name)
                self.stage, self.stages[name] = None, values

    def on_end(self) -> None:
        """Write and log what was found. Raises RunError if that breaks a rule."""
        run, found = self.evaluation.run_of, self.finish()
        log, path, data = run.log, run.log_path.with_suffix(".audit.json"), json.dumps(found) + "\n"
        T.together(lambda: T.write_atomically(path, data.encode()), 1)
        violations = found["violations"]
        log.event("audit", violations=len(violations), share=found["share"])
        if violations:
            raise T.RunError("audit: " + "; ".join(violations))

    def check_read(self, stage: Stage, read: T.Read, scored: Tensor) -> bool:
        """Repeat a read with other tokens behind a random place, and sum the probabilities there.

        Returns False if it scored nothing.
        """
        at, places = read.at, scored.nonzero().tolist()
        if not places:
            return False
        row, column = self.own.choice(places[1:] or places)  # rather one with others before
        p = int(at[row, column])
        scorer = with_others(read.scorer, slice(p + 1, None), self.own)
        if wrong := at[(at < p) & self.differ(read, scorer)].tolist():
            stage.fail("reads", f"a later token was read: behind number {p}, at position {min(wrong)}")
        if self.documents_apart():
            begin = max([0, *(stage.tokens[: p + 1] == T.BOS).nonzero()[-1:].flatten().tolist()])
            before = with_others(read.scorer, slice(0, begin), self.own)
            if wrong := at[(begin <= at) & (at < p) & self.differ(read, before)].tolist():
                what = "another document was read"
                stage.fail("reads", f"{what}: one before number {begin}, at position {min(wrong)}")
        losses = self.losses_of_all(stage, read, scorer, row, column)
        total, real = losses.neg().exp().sum().item(), losses[stage.tokens[p + 1]].item()
        recorded = read.losses[row, column].item()
        if not abs(total - 1) <= SUM_TOLERANCE:
            stage.fail("sums", f"probabilities do not sum to 1: at position {p} to {total:.6f}")
        if not abs(real - recorded) <= TOLERANCE[read.matrices.qkv.dtype]:
            line = f"position {p} has {recorded:.4f} nats, with nothing behind it {real:.4f}"
            stage.fail("sums", f"a score is not that of its context alone: {line}")
        stage.made.update(("sums", "reads"))
        return True

    def documents_apart(self) -> bool:
        """Returns whether nothing of a document may depend on one before it."""
        return self.s.document_attention and self.s.smear == "token" and self.s.bigram_vocab_size < 2

    def differ(self, read: T.Read, scorer: T.Scorer) -> Tensor:
        """Returns where losses (B, T) are others when a scorer of another text repeats a read."""
        with torch.set_grad_enabled(read.losses.requires_grad):
            again = scorer.read(read.at, read.matrices, read.cache and list(read.cache))
        return again.losses.detach() != read.losses

    @torch.no_grad()
    def losses_of_all(self, stage: Stage, read: T.Read, scorer: T.Scorer, row: int, column: int) -> Tensor:
        """Returns the losses (V,) fp64 of all tokens in a place."""
        model, at = copy.copy(scorer.model), read.at[row : row + 1]
        cache = read.cache and [slot[:, row : row + 1] for slot in read.cache]
        seen = torch.cat((at[:, :1] - 2, at[:, :1] - 1, at), dim=1) if cache else at  # as in Scorer.read()
        ids, context = scorer.ids(seen), scorer.context(at, cache)
        every = torch.arange(self.s.vocab_size, device=ids.device)[None]  # (1, V)

        def logits_of_place(tokens: Tensor, *rest: Any) -> Tensor:
            if not torch.equal(tokens, ids):
                stage.fail("sums", f"a target was read before it was scored: after position {at[0, column]}")
            return scorer.model.logits(tokens, *rest)[:, column : column + 1].expand(1, every.size(1), -1)

        model.logits = logits_of_place
        return model.forward(ids, every, read.matrices, context)[0].double()

    def replay(self, stage: Stage, ttt: T.TestTimeTraining) -> None:
        """Score a chunk, if of two targets or more, ahead with other tokens behind a random one."""
        mode, learner, chunk, first = ttt.mode, ttt.learner, stage.chunks[-1][1], ttt.mode.context_chunks
        low, end = int(scored_so_far(ttt).tokens), (chunk + 1 - first) * mode.s.ttt_chunk_tokens
        high = min(first * mode.scorer.window + end, stage.targets)  # a last window may score some more
        if high - low < 2:
            return
        stage.last = self.choice().randint(min((low + high) // 2 + 1, high - 1), high - 1)
        scorer = with_others(mode.scorer, slice(stage.last + 1, None), self.choice())
        scorer.hooks = stage.replay = Stage(scorer)
        state, bits = copy.deepcopy(learner.state_dict()), fingerprint(stage.model)
        type(mode)(mode.s, scorer, learner).score_chunk(chunk)
        learner.slots = state["slots"]
        learner.losses = state["losses"]
        learner.sgd.load_state_dict(state["sgd"])
        if fingerprint(stage.model) != bits:
            stage.fail("weights", MOVED)
            T.copy_weights(learner.weights, state["weights"])
        stage.trust(bits=True)
        stage.made["chunks"] += 1
        stage.due = True

    def check_bytes(self, stage: Stage, score: T.Score) -> None:
        """Compare the bytes with those of the text, as far as there is time."""
        text, made, now = self.text, stage.made, time.perf_counter()
        if score.bytes != text.bytes:
            stage.fail("bytes", f"other bytes than the whole text's: {score.bytes:.0f}, not {text.bytes}")
        end = now + DECODING * (now - self.start)
        while text.pieces and (not made["bytes"] or self.whole_text or time.perf_counter() < end):
            low, high = text.pieces.pop()
            counted, size = text.count(low, high), text.decode(low, high)
            if size not in (None, counted):
                what = "a document's bytes are not those of its text"
                stage.fail("bytes", f"{what}: {counted}, not {size}, from token {low} on")
            made["bytes"] += size is not None

    def finish(self) -> dict[str, Any]:
        """Watch no more; return what was found, the same on every process."""
        seconds, s = time.perf_counter() - self.start, self.s
        opened = [*files_opened()]
        evaluation, self.evaluation = self.evaluation, None
        scores = {name: values_of(T.Score(*score)) for name, score in evaluation.scores.items()}
        if not s.resume:
            unseen = scores.keys() - self.stages.keys()
            self.failed += [("positions", f"{name}: nothing of it was recorded") for name in unseen]
        gc.collect()  # what nobody uses any more is not open
        files = dict.fromkeys(opened, "was opened") | dict.fromkeys(still_open(), "is still open")
        wrong = [f"a file of no use to scoring {how}: {p}" for p, how in files.items() if is_forbidden(p, s)]
        here, system = os.getcwd() + os.sep, (sys.prefix, sys.base_prefix, "/proc", "/dev", "/sys")
        own = {path.removeprefix(here) for path in opened if not path.startswith(system)}
        self.failed += [("files", line) for line in wrong]
        every = T.gather((self.failed, own, self.apart / seconds))
        failed = [failure for failures, *_ in every for failure in failures]
        return {
            "violations": list(dict.fromkeys(line for _, line in failed)),
            "failed": sorted({check for check, _ in failed}),
            "share": max(share for *_, share in every),
            "seconds": seconds,
            "seed": self.seed,
            "processes": T.world_size(),
            "hashes": self.hashes,
            "versions": {name: version(name) for name in ("torch", "numpy", "sentencepiece")},
            "stages": scores | self.stages,
            "opened": sorted(set().union(*(own for _, own, _ in every))),
            "settings": {name: T.show(getattr(s, name.lower())) for name in T.FIELDS},
        }
