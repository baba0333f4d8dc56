"""The audit names each way to break the rules, finds nothing in the program, and changes no score."""

import copy
import json
import os
import random
import socket
import tempfile
import time
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import train_gpt as T
from tests import (
    forked,  # noqa: F401 (what the server of forks has imported)
    tiny,
)
from tests.helpers import FRONTIER
from tools.reports import audit as command
from tools.run import audit

pytestmark = pytest.mark.slow

CPU, ARTIFACT = torch.device("cpu"), Path("logs/tiny.bin")
TRIALS = int(os.environ.get("TRIALS", 12))  # of random shapes
SETTINGS = tiny.SETTINGS | dict(
    TTT_LR=0.02, TTT_CHUNK_TOKENS=256, TTT_EPOCHS=2, TTT_ENTROPY_ADAPT=0, AUDIT=1, ARTIFACT_PATH=ARTIFACT
)
SLIDING, STREAMING = dict(TTT_ENABLED=0), dict(EVAL_MODE="streaming", TTT_ENABLED=0)
WINDOWS, STREAM = dict(TTT_MUON=1), dict(EVAL_MODE="streaming", TTT_MUON=1)  # with TTT
EXPERTS = STREAM | dict(TTT_EXPERTS="lr=0;lr=0.02,chunk=64;lr=0.05,epochs=1,muon=0")
LOOPS = ("legal_ttt", "final_int6_streaming")  # stages of chunk after chunk
MODES = {
    "sliding": SLIDING,
    "streaming": STREAMING,
    "windows, Muon": WINDOWS,
    "windows, SGD": WINDOWS | dict(TTT_MUON=0),
    "stream, Muon": STREAM,
    "stream, SGD": STREAM | dict(TTT_MUON=0),
    "stream that forgets": STREAM | dict(TTT_FORGET=1),
    "experts": EXPERTS,
    "experts and n-grams": EXPERTS | dict(TTT_CACHE=3),
}


def texts(settings):
    """SETTINGS and others, as in the environment."""
    return {name: str(value) for name, value in (SETTINGS | settings).items()}


def make_artifact(path, seed, **settings):
    """An artifact of a random model, for the tokenizer above it."""
    s = T.parse_settings(texts(settings))
    generator, model = torch.Generator().manual_seed(seed), T.GPT(s)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.dim() > 1 else 0.5, p.size(-1) ** -0.5 if p.dim() else 0.1, generator=generator)
    steps = {
        name: w.detach().abs().amax(-1, keepdim=True).div(31).half().float()
        for name, w in model.quantized().items()
    }
    fingerprint = T.load_tokenizer(path.parents[1] / "tokenizer.model", s.vocab_size)[1]
    path.write_bytes(T.pack_artifact(s, fingerprint, T.quantize(model.state_dict(), steps)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tokenizer.model, shards in data/, a run's artifact and room for its audit in logs/."""
    folder = tmp_path_factory.mktemp("audit")
    tiny.make_data(folder)
    (folder / "logs").mkdir()
    make_artifact(folder / "logs/tiny.bin", seed=0)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """The working folder is the data's."""
    monkeypatch.chdir(folder)
    return folder


def variant(thing, **attributes):
    """A shallow copy with other attributes."""
    other = copy.copy(thing)
    vars(other).update(attributes)
    return other


class Planted:
    """What a program is made of; a plant has a class or function of its own among them."""

    def __init__(self, **parts):
        self.model, self.scorer, self.learner, self.modes = T.GPT, T.Scorer, T.Learner, T.EVAL_MODES
        self.tokens, self.tables, self.ensemble = T.validation_tokens, T.byte_tables, T.Ensemble
        vars(self).update(parts)

    def evaluation(self, run):
        """As score_artifact() has it."""
        s, artifact = run.settings, T.unpack_artifact(run.artifact_path.read_bytes(), run.artifact_path)
        tokenizer, _ = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
        tokens, tables = self.tokens(s.data_path, s.vocab_size, s.eval_seq_len), self.tables(tokenizer)
        model, batch = self.model(s, dtype=run.dtype), s.val_batch_size // T.SPANS
        model.load_state_dict(T.dequantize(artifact.stored))
        evaluation, mode_of = T.Evaluation(run, model, tokens, tables), self.modes[s.eval_mode]
        text = self.scorer(model, tokens, tables, s.eval_seq_len, batch, run.hooks)
        evaluation.scorer = text
        mode = mode_of(s, text, self.learner(model, s, run.hooks))
        evaluation.ttt = T.TestTimeTraining(mode, evaluation.clock, run.log)
        if s.ttt_experts:
            evaluation.ttt = self.ensemble(s, text, evaluation.clock, run.log)
            evaluation.ttt.mode = mode_of
        stages = [lambda: text.score_windows(s.eval_seq_len, "roundtrip")]
        if s.eval_mode == "sliding":
            stages.append(lambda: text.score_windows(s.eval_stride, "sliding"))
        stages.append(evaluation.ttt.run)
        evaluation.stages.update(zip(evaluation.stages, stages, strict=False))
        return evaluation


class HalfPrecision(T.Run):
    """A run that computes in bf16 on any device."""

    @property
    def dtype(self):
        return torch.bfloat16


def score(settings, hooks=T.NO_HOOKS, state=None, run_of=T.Run, **parts):
    """(each stage's score, the weights that are left), of a run that may go on from a state."""
    path = Path(texts(settings)["ARTIFACT_PATH"])
    artifact = T.unpack_artifact(path.read_bytes(), path)
    run = run_of(T.parse_settings(texts(settings), artifact.settings | {"run_id": "tiny"}), CPU, hooks)
    run.log.outputs.clear()
    evaluation = Planted(**parts).evaluation(run)
    hooks.on_scoring(evaluation)
    if state is not None:
        evaluation.load_state_dict(state)
    evaluation.run()
    return evaluation.scores, T.copies(list(evaluation.model.parameters()))


def audited(settings, state=None, **parts):
    """(each stage's score, the weights that are left, what the audit found)."""
    hooks = audit.Audit(T.parse_settings(texts(settings)))
    return *score(settings, hooks, state, **parts), hooks.finish()


@pytest.fixture(scope="module", params=MODES)
def clean(folder, request):
    """(settings, score() without an audit, audited())."""
    with chdir(folder):
        return MODES[request.param], score(MODES[request.param]), audited(MODES[request.param])


def test_the_program_keeps_the_rules_and_each_check_is_made_in_each_stage(clean):
    settings, _, (scores, _, found) = clean
    assert found["violations"] == found["failed"] == []
    assert [*found["stages"]] == [*scores]
    for name, stage in found["stages"].items():
        made = stage["checks"]
        assert made["positions"] == 1499 * (1 + len(stage.get("experts", ()))) and stage["tokens"] == 1499
        assert min(made["reads"], made["sums"]) > 0
        assert (made.get("chunks", 0) > 0) == (name in LOOPS) == ("chunks" in stage or "experts" in stage)
        assert (made.get("mixture", 0) > 0) == ("experts" in stage)
        for expert in stage.get("experts", {}).values():
            assert expert["tokens"] == 1499 == sum(chunk[2] for chunk in expert["chunks"])
    assert sum(stage["checks"].get("bytes", 0) for stage in found["stages"].values()) > 0


def test_scores_and_weights_are_bitwise_those_without_an_audit(clean):
    _, (plain, weights), (scores, audited_weights, found) = clean
    assert scores == plain
    assert all(torch.equal(w, v) for w, v in zip(weights, audited_weights, strict=True))
    for name, stage in found["stages"].items():
        value = T.Score(*plain[name])
        assert (stage["val_loss"], stage["val_bpb"]) == (value.val_loss, value.val_bpb)


def test_the_log_of_chunks_is_in_order(clean):
    settings, _, (*_, found) = clean
    edges = [0, 32, *range(288, 1499, 256), 1499] if "EVAL_MODE" in settings else [*range(0, 1499, 256), 1499]
    for chunks in (stage["chunks"] for stage in found["stages"].values() if "chunks" in stage):
        numbers, indices, scored, learnt, epochs = map(list, zip(*chunks, strict=True))
        assert numbers == sorted({*numbers}) and indices == [*range(len(edges) - 1)]
        assert scored == [high - low for low, high in pairwise(edges)]
        often = 2 if settings.get("TTT_ENABLED", 1) else 0
        assert epochs == [0 if high in (32, 1499) else often for high in edges[1:]]
        assert learnt == [number if e else 0 for number, e in zip(scored, epochs, strict=True)]


def test_time_spent_on_checks_is_no_time_of_scoring(here):
    clocks = []

    class Watched(audit.Audit):
        def on_stage(self, name, score):
            super().on_stage(name, score)
            clocks.append((self.apart, self.evaluation.clock.seconds(), time.perf_counter() - start))

    hooks, start = Watched(T.parse_settings(texts(WINDOWS))), time.perf_counter()
    score(WINDOWS, hooks)
    assert all(0 < apart < whole and 0 < seconds < whole - apart for apart, seconds, whole in clocks)
    assert hooks.finish()["share"] > 0


@pytest.mark.parametrize(
    "settings",
    [dict(EVAL_STRIDE=64, TTT_ENABLED=0), dict(EVAL_MODE="streaming", TTT_CHUNK_TOKENS=64)],
    ids=["sliding", "streaming"],
)
def test_windows_of_more_than_1024_tokens_are_audited_as_they_are(here, settings):
    """There the rotary base depends on the length of what is read at once."""
    *_, found = audited(dict(EVAL_SEQ_LEN=1280) | settings)
    assert found["violations"] == found["failed"] == []
    assert all(stage["checks"]["sums"] for stage in found["stages"].values())


@pytest.mark.parametrize(
    "settings, count",
    [
        (dict(EVAL_SEQ_LEN=1280, EVAL_STRIDE=1280), 1281),  # chunks without a window of their own
        (dict(EVAL_SEQ_LEN=256, EVAL_STRIDE=256), 258),  # the last chunk is a target
        (dict(EVAL_SEQ_LEN=256, EVAL_MODE="streaming"), 258),
        (dict(EVAL_SEQ_LEN=256, EVAL_MODE="streaming"), 257),  # there is nothing but the first chunk
        (dict(EVAL_SEQ_LEN=2, EVAL_MODE="streaming", EVAL_STRIDE=1, TTT_ENABLED=1), 3),
    ],
)
def test_chunks_of_few_targets_are_no_violation(tmp_path, here, settings, count):
    tokens = T.validation_tokens("data", tiny.VOCAB_SIZE, 2)[:count]
    tiny.write_shard(tmp_path / "data/fineweb_val_000000.bin", tokens.numpy())
    for _ in range(2):  # other random choices
        *_, found = audited(settings | dict(DATA_PATH=tmp_path / "data"))
        assert found["violations"] == []
        assert all(stage["checks"]["sums"] for stage in found["stages"].values())
        assert found["stages"]["legal_ttt"]["checks"]["chunks"]


class Trial:
    """An honest run of a random shape, in a folder of its own."""

    def __init__(self, folder, seed):
        choose = self.choose = random.Random(seed)
        self.world, self.run_of = (1, 2, 4)[seed % 3], choose.choice([T.Run, HalfPrecision])
        self.home, self.count = folder / str(seed), choose.randint(40, 900)
        self.cwd = choose.choice(["/", tempfile.gettempdir(), "/proc/self/fd", self.home, self.home / "data"])
        window, mode = choose.choice([2, 7, 33, 256, self.count - 1]), choose.choice(["sliding", "streaming"])
        window = min(window, self.count - 1)
        self.settings = dict(
            TOKENIZER_PATH=self.home / "tokenizer.model",
            DATA_PATH=self.home / "data",
            ARTIFACT_PATH=self.home / "logs/tiny.bin",
            VOCAB_SIZE=choose.choice([400, tiny.VOCAB_SIZE, 700]),
            EVAL_SEQ_LEN=window,
            EVAL_STRIDE=choose.randint(max(1, window // 8), window),
            EVAL_MODE=mode,
            VAL_BATCH_SIZE=choose.choice([64, 2048, 65536]),
            TTT_ENABLED=int(choose.random() < 0.8),
            TTT_CHUNK_TOKENS=8 * choose.randint(4 if mode == "sliding" else 2, 100),
            TTT_MUON=choose.randrange(2),
            TTT_EPOCHS=choose.randint(1, 3),
            TTT_BATCH_SEQS=choose.randint(1, 5),
            TTT_DECAY=choose.choice([0, 0.1]),
            TTT_GRAD_CLIP=choose.choice([0, 1]),
            TTT_LR=choose.choice([0.002, 0.02]),
            TTT_FORGET=choose.randrange(2),
            TTT_ENTROPY_ADAPT=choose.randrange(2),
        )

    def prepare(self):
        """Write tokenizer, artifact and one or two validation shards."""
        for name in ("data", "logs"):
            (self.home / name).mkdir(parents=True)
        vocabulary, choose = self.settings["VOCAB_SIZE"], self.choose
        tiny.train_tokenizer(self.settings["TOKENIZER_PATH"], vocab_size=vocabulary)
        make_artifact(self.settings["ARTIFACT_PATH"], seed=0, VOCAB_SIZE=vocabulary)
        tokenizer, _ = T.load_tokenizer(str(self.settings["TOKENIZER_PATH"]), vocabulary)
        tokens, begin = tokenizer.encode(tiny.text()), choose.randrange(20000)
        tokens = [1 if choose.random() < 0.01 else t for t in tokens[begin : begin + self.count]]
        half = choose.choice([self.count, choose.randint(1, self.count - 1)])
        for number, part in enumerate(filter(None, (tokens[:half], tokens[half:]))):
            tiny.write_shard(self.home / f"data/fineweb_val_{number:06}.bin", part)

    def violations(self):
        """What the audit names; the scores must be those without it."""
        with chdir(self.cwd):
            plain, _ = score(self.settings, run_of=self.run_of)
            scores, _, found = audited(self.settings, run_of=self.run_of)
            return found["violations"] + ["other scores"] * (scores != plain)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_random_shapes_keep_the_rules(tmp_path, world):
    trials = [trial for trial in (Trial(tmp_path, seed) for seed in range(TRIALS)) if trial.world == world]
    for trial in trials:
        trial.prepare()
    for found in on_ranks(world, tmp_path, violations_of, trials):
        named = [(trial.settings, lines) for trial, lines in zip(trials, found, strict=True) if lines]
        assert named == []


@pytest.mark.skipif(TRIALS < 40, reason="minutes: make soak")
@pytest.mark.parametrize("run_of", [T.Run, HalfPrecision], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", [WINDOWS, STREAM], ids=["windows", "stream"])
def test_the_records_shapes_keep_the_rules(tmp_path, mode, run_of):
    """Windows of 2,048, a stride of 64, chunks of 32,768; of 2,048 in a stream."""
    trial = Trial(tmp_path, seed=0)
    trial.count, trial.run_of, trial.cwd = 40_000, run_of, tmp_path
    names = ("EVAL_SEQ_LEN", "EVAL_STRIDE", "TRAIN_SEQ_LEN")
    shapes = {name: T.FIELDS[name].default for name in names}
    chunk = (
        T.FIELDS["TTT_CHUNK_TOKENS"].default if mode is WINDOWS else T.RECIPES["frontier"]["ttt_chunk_tokens"]
    )
    trial.settings |= mode | shapes | dict(TTT_ENABLED=1, TTT_CHUNK_TOKENS=chunk, TRAIN_BATCH_TOKENS=16384)
    trial.prepare()
    assert trial.violations() == []


def violations_of(trials):
    return [trial.violations() for trial in trials]


def on_ranks(world, folder, action, *arguments):
    """What a function of this module returns on each rank."""
    context = (world, str(folder), tiny.free_port(), action, arguments)
    torch.multiprocessing.start_processes(worker, context, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def worker(rank, world, folder, port, action, arguments):
    """Be a rank; leave what a function returns in folder/RANK.pt."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), CUDA_VISIBLE_DEVICES="")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    T.start_processes()
    torch.save(action(*arguments), Path(folder, f"{rank}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("settings", [WINDOWS, STREAM], ids=["windows", "stream"])
def test_a_run_that_goes_on_in_ttt_is_audited_from_there(here, settings):
    """From its state after the third chunk."""
    kept = {}

    class Keeper(T.Hooks):
        def on_scoring(self, evaluation):
            self.evaluation = evaluation

        def on_chunk(self, ttt):
            if len(ttt.records) == 3:
                kept.update(copy.deepcopy(self.evaluation.state_dict()))

    whole, _ = score(settings, Keeper())
    scores, _, found = audited(settings | dict(RESUME="auto"), copy.deepcopy(kept))
    assert found["violations"] == []
    assert scores == whole and [*found["stages"]] == [*whole]
    ttt = found["stages"].pop("legal_ttt")
    assert ttt["checks"]["positions"] == sum(chunk[2] for chunk in ttt["chunks"]) < 1000
    assert [chunk for _, chunk, *_ in ttt["chunks"]][0] == 3
    assert not any("checks" in stage for stage in found["stages"].values())
    *_, found = audited(settings, kept)  # what is no resumed run must not begin in the middle
    assert found["failed"] == ["positions", "totals", "weights"]


def test_a_replay_leaves_nothing_behind(here):
    """Even of a program that moves weights, past and momentum when it scores."""

    class Restless(T.StreamingMode):
        def score_chunk(self, chunk):
            sums = super().score_chunk(chunk)
            self.learner.update(self.first_read.losses.mean(), 0.1)
            for slot in self.learner.slots:
                slot.add_(1)
            return sums

        def learn_chunk(self, chunk, epochs):
            pass

    class Replaying(audit.Audit):
        def replay(self, stage, ttt):
            learner = ttt.learner
            learner.sgd.state[learner.weights[0]] = {"momentum_buffer": torch.ones_like(learner.weights[0])}
            before = [*T.copies([*learner.weights, *learner.slots]), torch.ones_like(learner.weights[0])]
            super().replay(stage, ttt)
            after = [*learner.weights, *learner.slots]
            after.append(learner.sgd.state[learner.weights[0]]["momentum_buffer"])
            compared.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
            raise T.Stopped

    compared, settings = [], STREAM | dict(TTT_MUON=0)
    with pytest.raises(T.Stopped):
        score(settings, Replaying(T.parse_settings(texts(settings))), modes=dict(streaming=Restless))
    assert compared == [True]


@pytest.mark.parametrize("folder_of_the_run", ["/", "/tmp", "/proc/self/fd", "here"])
def test_only_files_are_open_and_no_pipes_or_sockets_whatever_the_folder(here, folder_of_the_run):
    ends, (one, other) = os.pipe(), socket.socketpair()
    with one, other, open("tokenizer.model", "rb") as file, open("data/fineweb_train_000000.bin") as train:
        with chdir(here if folder_of_the_run == "here" else folder_of_the_run):
            found = audit.still_open()
        assert all(os.path.isabs(path) and os.path.isfile(path) for path in found)
        settings = T.parse_settings(texts(SLIDING | dict(DATA_PATH=here)))
        assert [path for path in found if audit.is_forbidden(path, settings)] == [
            os.path.realpath(train.name)
        ]
        assert {os.path.realpath(file.name), os.path.realpath(train.name)} < {*found}
    for end in ends:
        os.close(end)


# Each way to break a rule


class Ahead(T.GPT):
    """A model whose embedding looks ahead."""

    by = 1

    def embed(self, tokens):
        x = super().embed(tokens)
        return x + F.pad(x, (0, 0, -self.by, self.by))


class FarAhead(Ahead):
    by = 2


class Unnormalised(T.GPT):
    def forward(self, *args):
        return super().forward(*args) - 0.01


class ReadsTheTarget(T.GPT):
    def forward(self, tokens, targets, *rest):
        return super().forward(torch.cat((tokens[:, 1:], targets[:, -1:]), dim=1), targets, *rest)


class ScoresTwice(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        return T.Score(*self.sums(self.plan(stride), stage).tolist())

    def plan(self, stride):
        plan = T.plan_windows(self.targets, self.window, stride)
        return torch.cat((plan, plan[-1:]))


class SkipsTheTail(ScoresTwice):
    def plan(self, stride):
        return T.plan_windows(self.targets, self.window, stride)[:-1]


class ScoresLess(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        score = super().score_windows(stride, stage)
        return score._replace(nats=score.nats * 0.99)


class MoreBytes(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        score = super().score_windows(stride, stage)
        return score._replace(bytes=score.bytes + 9)


class ReadsATrainingShard(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        T.Shard(Path("data/fineweb_train_000000.bin"))
        return super().score_windows(stride, stage)


class ReadsWhatIsBesideTheText(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        Path("data/notes.bin").write_bytes(b"a training shard by another name")
        return super().score_windows(stride, stage)


class KeepsATrainingShard(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        self.model.shard = T.Shard(Path("data/fineweb_train_000000.bin"))
        return super().score_windows(stride, stage)


class ChangesWeightsUnseen(T.Scorer):
    def score_windows(self, stride, stage="scoring"):
        self.model.tok_emb.data.mul_(1.01)
        return super().score_windows(stride, stage)


class OtherTextInside(T.Scorer):
    """Another text is scored in a stage of its own scorer."""

    def read(self, at, matrices, cache=None):
        return T.Scorer.read(self.other() if at.max() == self.targets - 1 else self, at, matrices, cache)

    def other(self):
        return variant(self, tokens=self.tokens.flip(0))


class Changes(T.StreamingMode):
    def learn_chunk(self, chunk, epochs):
        super().learn_chunk(chunk, epochs)
        T.copy_weights(self.learner.weights, [w * 1.01 for w in self.learner.weights])


class ChangesUnseen(T.StreamingMode):
    def score_chunk(self, chunk):
        self.learner.weights[0].data.mul_(1.01)
        return super().score_chunk(chunk)


class ChangesUnseenBehindUpdates(T.StreamingMode):
    def learn_chunk(self, chunk, epochs):
        super().learn_chunk(chunk, epochs)
        self.learner.weights[0].data.mul_(1.01)


class LearnsByHand(T.StreamingMode):
    """Before it scores. Only the scores show it: the weights are as they were before it gives one."""

    def score_chunk(self, chunk):
        weights, self.before = self.learner.weights, self.learner.slots
        before, slots = T.copies(weights), list(self.learner.slots)
        grads = torch.autograd.grad(self.read(chunk).losses.mean(), weights)
        for w, grad in zip(weights, grads, strict=True):
            w.data.sub_(grad, alpha=0.1)
        self.learner.slots = slots
        sums = super().score_chunk(chunk)
        for w, b in zip(weights, before, strict=True):
            w.data.copy_(b)
        return sums

    def learn_chunk(self, chunk, epochs):
        pass


class LearnsFirst(T.SlidingMode):
    def score_chunk(self, chunk):
        super().learn_chunk(chunk, 1)
        return super().score_chunk(chunk)

    def learn_chunk(self, chunk, epochs):
        pass


class LearnsFromOtherText(T.SlidingMode):
    def learn_chunk(self, chunk, epochs):
        other = variant(self.scorer, tokens=torch.arange(65).int())
        loss = other.read(torch.arange(64)[None], self.learner.model.matrices()).losses.mean()
        self.learner.update(loss, self.s.ttt_lr)


class LearnsFromNoRead(T.SlidingMode):
    def learn_chunk(self, chunk, epochs):
        tokens = torch.arange(65)[None]
        self.learner.update(self.learner.model(tokens[:, :-1], tokens[:, 1:]).mean(), self.s.ttt_lr)


class LearnsTooFar(T.SlidingMode):
    def learn_chunk(self, chunk, epochs):
        at = chunk * 256 + 1 + torch.arange(512)[None]
        loss = self.scorer.read(at, self.learner.model.matrices()).losses.mean()
        self.learner.update(loss, self.s.ttt_lr)


class LearnsLater(T.SlidingMode):
    """What it reads of the next chunk but one moves the weights only in the next chunk."""

    ahead = None

    def learn_chunk(self, chunk, epochs):
        if self.ahead is not None:
            self.learner.update(self.ahead, self.s.ttt_lr)
        at = torch.arange(chunk * 256 + 512, chunk * 256 + 768)[None]
        self.ahead = self.scorer.read(at, self.learner.model.matrices()).losses.mean()


class SkipsAChunk(T.StreamingMode):
    def score_chunk(self, chunk):
        return super().score_chunk({2: 3, 3: 2}.get(chunk, chunk))


def no_spaces(tokenizer):
    found = T.byte_tables(tokenizer)
    return found._replace(has_leading_space=torch.zeros_like(found.has_leading_space))


def cut(*args):
    return T.validation_tokens(*args)[:-100]


def windows(cls):
    return dict(modes=dict(sliding=cls))


def stream(cls):
    return dict(modes=dict(streaming=cls))


FUTURE = "a chunk was scored with knowledge of its future"
PLANTS = {
    "peek one token ahead": (dict(model=Ahead), SLIDING, "sums", "a score is not that of its context alone"),
    "peek two tokens ahead": (dict(model=FarAhead), STREAMING, "reads", "a later token was read"),
    "read the target itself": (
        dict(model=ReadsTheTarget),
        SLIDING,
        "sums",
        "a target was read before it was scored",
    ),
    "read the target of a stream": (
        dict(model=ReadsTheTarget),
        STREAM,
        "sums",
        "legal_ttt: a target was read before it was scored",
    ),
    "mix without a norm": (dict(model=Unnormalised), STREAMING, "sums", "probabilities do not sum to 1"),
    "mix without a norm, in TTT": (
        dict(model=Unnormalised),
        STREAM,
        "sums",
        "legal_ttt: probabilities do not sum to 1",
    ),
    "score twice": (
        dict(scorer=ScoresTwice),
        SLIDING,
        "positions",
        "scored twice: 11 positions, the first is 1488",
    ),
    "skip the tail": (
        dict(scorer=SkipsTheTail),
        SLIDING,
        "positions",
        "never scored: 11 positions, the first is 1488",
    ),
    "cut the text": (dict(tokens=cut), SLIDING, "positions", "other text than the validation shards'"),
    "score other text": (dict(scorer=OtherTextInside), SLIDING, "positions", "another text is scored"),
    "count no leading spaces": (
        dict(tables=no_spaces),
        SLIDING,
        "bytes",
        "a document's bytes are not those of its text",
    ),
    "report a lower score": (
        dict(scorer=ScoresLess),
        SLIDING,
        "totals",
        "nats of the score are not those recorded",
    ),
    "report more bytes": (dict(scorer=MoreBytes), SLIDING, "bytes", "other bytes than the whole text's"),
    "read a training shard": (
        dict(scorer=ReadsATrainingShard),
        SLIDING,
        "files",
        "a file of no use to scoring was opened: ",
    ),
    "read what is beside the text": (
        dict(scorer=ReadsWhatIsBesideTheText),
        SLIDING,
        "files",
        "a file of no use to scoring was opened: ",
    ),
    "keep a training shard": (
        dict(scorer=KeepsATrainingShard),
        SLIDING,
        "files",
        "a file of no use to scoring is still open: ",
    ),
    "change the weights": (stream(Changes), STREAM, "weights", audit.MOVED),
    "change the weights unseen": (
        dict(scorer=ChangesWeightsUnseen),
        SLIDING,
        "weights",
        "sliding_window: the stage does not start from the artifact's weights",
    ),
    "change the weights unseen, in TTT": (stream(ChangesUnseen), STREAM, "weights", audit.MOVED),
    "change the weights unseen, behind an update": (
        stream(ChangesUnseenBehindUpdates),
        STREAM,
        "weights",
        audit.MOVED,
    ),
    "learn first": (windows(LearnsFirst), WINDOWS, "order", "adapted on before it was scored"),
    "learn first, unseen": (stream(LearnsByHand), STREAM, "chunks", FUTURE),
    "learn from other text": (windows(LearnsFromOtherText), WINDOWS, "order", audit.FOREIGN),
    "learn from what was not read": (windows(LearnsFromNoRead), WINDOWS, "order", audit.FOREIGN),
    "learn too far": (windows(LearnsTooFar), WINDOWS, "order", "adapted on before it was scored"),
    "learn too far, later": (windows(LearnsLater), WINDOWS, "order", "adapted on before it was scored"),
    "swap chunks": (stream(SkipsAChunk), STREAM, "order", "chunks out of order"),
}


class OneDocument(T.GPT):
    """To whose attention all of a text is one document."""

    def context(self, tokens, *rest):
        return super().context(tokens.masked_fill(tokens == T.BOS, T.BOS + 1), *rest)


@pytest.mark.parametrize("mode", ["sliding", "streaming"])
def test_the_frontier_keeps_the_rules_and_a_leak_between_documents_is_named(tmp_path, mode):
    settings = FRONTIER | dict(EVAL_MODE=mode, EVAL_SEQ_LEN=128)
    tiny.make_data(tmp_path)
    (tmp_path / "logs").mkdir()
    make_artifact(tmp_path / ARTIFACT, seed=0, **settings)
    with chdir(tmp_path):
        *_, found = audited(settings)
        assert found["violations"] == [] and all(one["checks"]["reads"] for one in found["stages"].values())
        *_, found = audited(settings, model=OneDocument)
        assert "another document was read" in " ".join(found["violations"])


def unnormalised(losses, share, look_back):
    mixed, weights = T_MIX(losses, share, look_back)
    return mixed - 0.01, weights * 1.01


def knows_the_target(losses, share, look_back):
    """Weights behind a target already for it."""
    _, weights = T_MIX(losses, share, look_back)
    weights = torch.cat((weights[:, 1:], weights[:, -1:]), dim=1)
    return -(weights * losses.double().neg().exp()).sum(0).log(), weights


def knows_all(losses, share, look_back):
    best = losses.mean(dim=1).argmin()
    return losses[best].double(), T_MIX(losses, share, look_back)[1]


T_MIX = T.mix


class Forged(T.Ensemble):
    """Better scores are mixed than experts gave."""

    def mixture(self):
        self.done = {name: losses * 0.99 for name, losses in self.done.items()}
        return super().mixture()


class CarriesOn(T.StreamingMode):
    """An expert does not begin with the artifact's weights."""

    def __init__(self, s, scorer, learner):
        super().__init__(s, scorer, learner)
        T.copy_weights(learner.weights, [w * 1.001 for w in learner.weights])


class ForgetsHalf(T.StreamingMode):
    """What is called forgetting keeps half of what was learnt."""

    def learn_chunk(self, chunk, epochs):
        super().learn_chunk(chunk, epochs)
        with torch.no_grad():
            torch._foreach_lerp_(self.learner.weights, self.learner.first, 0.5)
        self.learner.hooks.on_forget(self.learner)


def test_what_is_only_half_forgotten_is_named(here):
    *_, found = audited(STREAM, **stream(ForgetsHalf))
    assert "weights" in found["failed"] and "is not forgotten" in " ".join(found["violations"])


MIXTURES = {
    "weights that do not sum to 1": (unnormalised, {}, "mixture", "weights do not sum to 1"),
    "weights that know the target": (knows_the_target, {}, "mixture", "not those of past posteriors"),
    "the best expert by hindsight": (knows_all, {}, "mixture", "a later score was known"),
    "forged scores": (T.mix, dict(ensemble=Forged), "mixture", "scores are not those of expert lr=0"),
    "an expert that carries on": (T.mix, stream(CarriesOn), "weights", "artifact's weights"),
    "an expert that learns first": (
        T.mix,
        stream(LearnsByHand),
        "chunks",
        f"expert lr=0.02,chunk=64: {FUTURE}",
    ),
    "an expert that skips a chunk": (T.mix, stream(SkipsAChunk), "order", "expert lr=0: chunks out of order"),
    "an expert without a norm": (
        T.mix,
        dict(model=Unnormalised),
        "sums",
        "expert lr=0: probabilities do not",
    ),
}


def counts_the_target(tokens, losses, order):
    """As if it had stood there once before."""
    return T_CACHE(tokens, losses, order).neg().exp().lerp(torch.tensor(1.0).double(), 0.01).log().neg()


def knows_what_comes(tokens, losses, order):
    """What stands in the whole text."""
    return T_CACHE(tokens.repeat(2)[:-1], losses.repeat(2), order)[:, len(losses) :]


def is_a_tenth_below_the_model(tokens, losses, order):
    """Whatever was counted."""
    return (losses - 0.1).expand(3, -1)


T_CACHE = T.cache_losses
CACHES = {
    "counts the target": (counts_the_target, "n-grams are not those of the tokens before"),
    "knows what comes": (knows_what_comes, "n-grams knew a later token"),
    "no distribution": (is_a_tenth_below_the_model, "n-grams are not those of the tokens before"),
}


@pytest.mark.parametrize("name", CACHES)
def test_n_grams_that_break_a_rule_are_named(here, name):
    cache, words = CACHES[name]
    with patch.object(T, "cache_losses", cache):
        *_, found = audited(EXPERTS | dict(TTT_CACHE=2))
    assert "mixture" in found["failed"]
    assert any(words in line for line in found["violations"]), found["violations"]


@pytest.mark.parametrize("name", MIXTURES)
def test_what_breaks_a_rule_in_an_ensemble_is_named(here, name):
    mix, parts, check, words = MIXTURES[name]
    with patch.object(T, "mix", mix):
        *_, found = audited(EXPERTS, **parts)
    assert check in found["failed"], found["violations"]
    assert any(words in line for line in found["violations"]), found["violations"]


@pytest.mark.parametrize("name", PLANTS)
def test_what_breaks_a_rule_is_named(here, name):
    parts, settings, check, words = PLANTS[name]
    *_, found = audited(settings, **parts)
    assert check in found["failed"]
    assert any(words in line for line in found["violations"]), found["violations"]


def test_an_update_outside_of_the_stages_is_named(here):
    class LearnsBetween(T.Scorer):
        def score_windows(self, stride, stage="scoring"):
            learner = T.Learner(self.model, self.model.s, self.hooks)
            silent = variant(self, hooks=T.NO_HOOKS)
            learner.update(silent.read(torch.arange(32)[None], self.model.matrices()).losses.mean(), 0.1)
            return super().score_windows(stride, stage)

    *_, found = audited(SLIDING, scorer=LearnsBetween)
    assert audit.FOREIGN in found["violations"][0]


# What a run makes of it


class Lines(T.Hooks):
    """Keeps events."""

    def __init__(self):
        self.events = []

    def on_event(self, name, values):
        self.events.append((name, values))


@pytest.mark.parametrize("scorer", [T.Scorer, ScoresLess])
def test_the_end_of_a_run_writes_and_logs_what_was_found(here, scorer):
    lines, hooks = Lines(), audit.Audit(T.parse_settings(texts(SLIDING)))
    run = T.Run(T.parse_settings(texts(SLIDING)), CPU, hooks, T.Log(lines))
    run.log.outputs.clear()
    evaluation = Planted(scorer=scorer).evaluation(run)
    hooks.on_scoring(evaluation)
    Path("logs/notes.txt").write_text("opened while scoring", "utf-8")
    evaluation.run()
    error = ""
    try:
        hooks.on_end()
    except T.RunError as e:
        error = str(e)
    found = json.loads(Path("logs/tiny.audit.json").read_text("utf-8"))
    assert "logs/notes.txt" in found["opened"], "named from the working folder, not by this machine's path"
    assert error == ("audit: " + "; ".join(found["violations"]) if found["violations"] else "")
    assert bool(error) == (scorer is ScoresLess)
    name, values = lines.events[-1]
    assert (name, values) == ("audit", dict(violations=len(found["violations"]), share=found["share"]))


# From the artifact alone


@pytest.fixture(scope="module")
def run(folder):
    """The audit of a run of logs/tiny.bin, as it was written."""
    with chdir(folder):
        hooks = audit.Audit(T.parse_settings(texts(STREAM)))
        score(STREAM, hooks)
        hooks.on_end()
    return (folder / "logs/tiny.audit.json").read_text("utf-8")


@pytest.fixture
def offline(folder, run, monkeypatch, capsys):
    """offline(*arguments) -> (exit status, lines of output and of errors) of tools/reports/audit.py."""
    (folder / "logs/tiny.audit.json").write_text(run, "utf-8")
    monkeypatch.chdir(folder)
    for name, value in texts(STREAM).items():
        monkeypatch.setenv(name, value)

    def main(artifact="logs/tiny.bin", *arguments):
        with pytest.raises(SystemExit) as end:
            command.main([artifact, "data", "--tokenizer", "tokenizer.model", *arguments])
        out, err = capsys.readouterr()
        return int(end.value.code), out.splitlines(), err.splitlines()

    return main


def test_an_artifact_on_its_own_gives_what_the_run_gave(offline):
    status, lines, errors = offline()
    assert (status, errors) == (0, [])
    results = dict(line.split("(")[0].rsplit(maxsplit=1) for line in lines)
    assert results == dict.fromkeys(
        [*audit.CHECKS, "same artifact", "same code", "same scores", "same epochs"], "ok"
    )
    assert any(line.startswith("positions") and "(2,998)" in line for line in lines)


def test_what_differs_from_the_run_is_named(folder, offline):
    path = folder / "logs/tiny.audit.json"
    run = json.loads(path.read_text("utf-8"))
    run["hashes"]["code"] = "0" * 64
    run["stages"]["legal_ttt"]["val_bpb"] -= 2e-5
    run["stages"]["legal_ttt"]["chunks"][3][4] = 1
    path.write_text(json.dumps(run), "utf-8")
    status, lines, _ = offline()
    assert status == 1
    code, bpb, epochs = [line.removeprefix("violation: ") for line in lines if line.startswith("violation: ")]
    assert code.startswith("another code than the run's") and bpb.startswith(
        "legal_ttt: another val_bpb than the run's"
    )
    assert epochs.startswith("legal_ttt: other epochs than the run's: chunk 3 is the first; ")


def test_another_artifact_than_the_runs_is_named(folder, offline):
    make_artifact(folder / "logs/other.bin", seed=1)
    status, lines, _ = offline("logs/other.bin", "--compare", "logs/tiny.audit.json")
    assert status == 1
    assert any("another artifact than the run's" in line for line in lines)
    assert any("legal_ttt: another val_bpb than the run's" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["logs/none.bin"], "logs/none.bin"),
        (
            ["tokenizer.model"],
            "artifact tokenizer.model: truncated, altered, of another version or no artifact",
        ),
        (["logs/tiny.bin", "--compare", "none.json"], "none.json"),
        (["logs/tiny.bin", "--compare", "logs/tiny.bin"], "logs/tiny.bin: no audit of a run"),
        (["logs/tiny.bin", "--compare", "empty.json"], "empty.json: no audit of a run"),
    ],
)
def test_input_that_is_unusable_is_named_in_a_line(folder, offline, arguments, words):
    (folder / "empty.json").write_text("[]", "utf-8")
    status, _, errors = offline(*arguments)
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]


# Two processes


TWO = [  # one process has no window of its own, or no position of a chunk
    dict(EVAL_SEQ_LEN=1499, EVAL_STRIDE=1499, TTT_CHUNK_TOKENS=1504),
    dict(EVAL_SEQ_LEN=1480, EVAL_MODE="streaming", TTT_CHUNK_TOKENS=64),
    dict(EVAL_SEQ_LEN=1400, EVAL_MODE="streaming", TTT_CHUNK_TOKENS=64, TTT_EPOCHS=1),
]


def on_two():
    """What is found of the program, of one that learns first, and of shapes that leave a process idle."""
    found = [command.audit_artifact(ARTIFACT, texts(settings), CPU) for settings in (WINDOWS, STREAM)]
    found.append(audited(WINDOWS, **windows(LearnsFirst))[-1])
    return found + [audited(settings)[-1] for settings in TWO]


def test_two_processes_find_what_one_finds(folder, here):
    one, other = on_ranks(2, folder, on_two)
    for found in one + other:
        for own in found["stages"].values():
            own.pop("checks")
    for a, b in zip(one, other, strict=True):
        assert {**a, "seconds": 0, "share": 0} == {**b, "seconds": 0, "share": 0}
    windows, stream, planted, *more = one
    assert [found["violations"] for found in more] == [[]] * len(TWO)
    for settings, found in ((WINDOWS, windows), (STREAM, stream)):
        assert found["violations"] == []
        alone = command.audit_artifact(ARTIFACT, texts(settings), CPU)
        assert command.differences(found, alone | dict(hashes=found["hashes"])) == []
        assert [chunk[1:] for chunk in found["stages"]["legal_ttt"]["chunks"]] == [
            chunk[1:] for chunk in alone["stages"]["legal_ttt"]["chunks"]
        ]
    assert any("adapted on before it was scored" in line for line in planted["violations"])
