"""Models, scorers and trainers of the tiny world in this process, on made-up tokens; and the worker that each
process of test_world_size.py runs. tiny.py has that world, and the ways to run the program in it.
"""

import io
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import train_gpt as T
from tests import tiny

BASE = (
    tiny.SETTINGS
    | dict(  # of what is made in this process: a vocabulary of made-up tokens, shorter chunks
        VOCAB_SIZE=64,
        NUM_LAYERS=3,
        NUM_HEADS=4,
        NUM_KV_HEADS=2,
        ROPE_DIMS=4,
        BIGRAM_VOCAB_SIZE=40,
        BIGRAM_DIM=16,
        VE_LAYERS="1,2",
        TRAIN_SEQ_LEN=16,
        TRAIN_BATCH_TOKENS=256,
        EVAL_STRIDE=8,
        VAL_BATCH_SIZE=1024,
        ITERATIONS=8,
        WARMUP_STEPS=0,
        WARMDOWN_ITERS=8,
        VAL_LOSS_EVERY=4000,
        TTT_CHUNK_TOKENS=48,
        TTT_BATCH_SEQS=2,
        TTT_ENTROPY_ADAPT=0,
    )
)


def settings(**extra):
    return T.parse_settings({name: str(value) for name, value in {**BASE, **extra}.items()})


def made_up_tokens(count, seed=0, vocab=64):
    """A learnable stream (count,) int32: each token allows four successors; every other run of 48 tokens
    repeats one."""
    random = np.random.default_rng(seed)
    tokens = np.zeros(count, np.int32)
    for i in range(1, count):
        tokens[i] = (5 * tokens[i - 1] + random.integers(4)) % vocab
    return np.where(np.arange(count) // 48 % 2, 7, tokens)


# Every part of the frontier's model, in a small one
FRONTIER = dict(
    RECIPE="frontier",
    BIGRAM_VOCAB_SIZE=0,
    VE_LAYERS="",
    NUM_LAYERS=5,
    XSA_LAST_N=5,
    LOOP_LAYERS="1-2",
    PARALLEL_FROM=3,
    TRAIN_SEQ_SCHEDULE="16@0,24@0.5",
    TRAIN_SEQ_LEN=32,
    EVAL_SEQ_LEN=24,
    EVAL_MODE="sliding",
)


def with_documents(tokens, every=19):
    """The tokens with a BOS now and then."""
    tokens = torch.as_tensor(tokens).clone()
    tokens[tokens == T.BOS] = T.BOS + 1
    tokens[::every] = T.BOS
    return tokens


def write_shards(folder):
    """Two train shards, of 4,000 and 3,000 tokens."""
    for i, count in enumerate((4000, 3000)):
        tiny.write_shard(Path(folder) / f"fineweb_train_{i:06d}.bin", made_up_tokens(count, seed=i))
    return folder


def byte_tables(vocab=64):
    """Tokens of 1 to 5 bytes; the first two are boundaries, every third of the others has a leading space."""
    ids = torch.arange(vocab)
    boundary = ids < 2
    return T.ByteTables(torch.where(boundary, 0, 1 + ids % 5).short(), (ids % 3 == 0) & ~boundary, boundary)


def random_model(s, seed=0):
    """A model in which every weight matters: none is zero, none saturates."""
    model = T.GPT(s)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.dim() > 1 else 0.5, p.size(-1) ** -0.5 if p.dim() else 0.1, generator=generator)
    return model


def random_batch(rows=4, length=16, seed=0):
    tokens = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def scorer_of(model, s, tokens, hooks=T.NO_HOOKS):
    """A Scorer of EVAL_SEQ_LEN, with byte_tables()."""
    batch, device = s.val_batch_size // 8, model.tok_emb.device
    tables = T.ByteTables(*(t.to(device) for t in byte_tables()))
    return T.Scorer(model, torch.as_tensor(tokens).int().to(device), tables, s.eval_seq_len, batch, hooks)


def score_stream(scorer, s, chunk=16):
    """The Score of a stream that does not learn, read in chunks."""
    values = dict(eval_mode="streaming", ttt_enabled=False, ttt_chunk_tokens=chunk)
    return score_first_ttt(scorer, replace(s, **values))[0]


def attention_by(kernel):
    """A context in which models attend by a function like T.attention."""
    return patch.object(T, "attention", kernel)


class PerTarget(T.Hooks):
    """Keeps the nll of each target, which may be scored once."""

    nll = None

    def on_scores(self, read, scored, sums):
        if self.nll is None:
            self.nll = torch.full(
                (read.scorer.targets,), math.nan, dtype=torch.float64, device=read.at.device
            )
        targets = read.at[scored]
        assert self.nll[targets].isnan().all() and len(targets.unique()) == len(targets)
        self.nll[targets] = read.losses.detach()[scored].double()


def ttt_of(scorer, s, learner=None, clock=None):
    """TestTimeTraining in EVAL_MODE."""
    learner = learner or T.Learner(scorer.model, s, scorer.hooks)
    return T.TestTimeTraining(T.EVAL_MODES[s.eval_mode](s, scorer, learner), clock)


def score_first_ttt(scorer, s, learner=None, clock=None):
    """The whole Score, and each chunk's (Score, epochs)."""
    ttt = ttt_of(scorer, s, learner, clock)
    return ttt.run(), [(T.Score(*sums.tolist()), epochs) for sums, epochs in ttt.records]


def learn(learner, tokens, epochs, lr):
    """Learn from the whole sequences in tokens (C + 1,), as from a chunk in sliding mode."""
    s = replace(learner.s, ttt_lr=lr, ttt_chunk_tokens=len(tokens) - 1)
    T.SlidingMode(s, scorer_of(learner.model, s, tokens), learner).learn_chunk(0, epochs)


def changed(tokens, i):
    tokens = torch.as_tensor(tokens).clone()
    tokens[i] = (tokens[i] + 11) % 64
    return tokens


class Trainer(T.Trainer):
    """`measured` collects what each step returns."""

    def __init__(self, *args):
        super().__init__(*args)
        self.measured = []

    def train_step(self, spans, multiplier, momentum):
        self.measured.append(super().train_step(spans, multiplier, momentum))
        return self.measured[-1]


def trainer_of(folder, cls=Trainer, hooks=T.NO_HOOKS, **extra):
    """A Trainer on the shards in folder."""
    return cls(T.Run(settings(DATA_PATH=folder, **extra), torch.device("cpu"), hooks, T.Log(hooks)))


def round_trip(state):
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def muon_update(grad, buffer, momentum, steps=5, row_norm=False, triples=T.CLASSIC):
    """What Muon subtracts from a bank, before its scale."""
    return T.orthogonalize(T.nesterov_update(grad, buffer, momentum, row_norm=row_norm), steps, triples)


def factors_of(moments):
    """As export() makes them of moments, which stay as they are."""
    return {name: T.factor(m.clone()) for name, m in moments.items()}


def snapshot(weights):
    return [w.detach().clone() for w in weights]


@contextmanager
def undone(weights):
    """The weights afterwards are as they were before."""
    before = snapshot(weights)
    yield
    T.copy_weights(weights, before)


TTT_RUNS = dict(muon=dict(TTT_MUON=1), sgd=dict(TTT_MUON=0), sgd_three=dict(TTT_MUON=0, TTT_BATCH_SEQS=3))
STREAM_RUNS = dict(stream_muon=dict(TTT_MUON=1, TTT_DECAY=0.01), stream_sgd=dict(TTT_MUON=0))
CHANGED = 150  # a token of the stream
TTT_ADAPT = dict(TTT_ENTROPY_ADAPT=1, TTT_ENTROPY_HIGH=3.45, TTT_ENTROPY_LOW=3, TTT_EPOCHS=2, TTT_LR=0.01)


def worker(rank, world, folder, port):
    """Train, score and learn while scoring as one of `world` processes; leave what came out in
    WORLD-RANK.pt."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    T.start_processes()
    trainer = trainer_of(folder, MATRIX_LR=0.01, BIGRAM_DIM=32)
    trainer.run(lambda: T.Score())
    found = dict(steps=torch.stack(trainer.measured), weights=snapshot(trainer.weights))
    if world > 1:  # start from the very same weights, so that only scoring and learning are compared
        T.copy_weights(trainer.weights, torch.load(f"{folder}/1-0.pt", weights_only=False)["weights"])

    frontier = trainer_of(folder, **FRONTIER, ITERATIONS=4, LOOP_FROM=0.5, MATRIX_LR=0.01)
    frontier.run(lambda: T.Score())  # loops and longer pieces half-way
    found["frontier"] = torch.stack(frontier.measured)

    tokens = made_up_tokens(5 * 48 + 21, seed=9)  # five chunks of three sequences and a short last one
    for stride in (32, 5):
        found[f"stride{stride}"] = scorer_of(trainer.model, trainer.s, tokens).score_windows(stride)
    found["streamed"] = score_stream(scorer_of(trainer.model, trainer.s, np.resize(tokens, 2000)), trainer.s)
    for name, extra in (TTT_RUNS | STREAM_RUNS).items():
        s = settings(
            EVAL_STRIDE=24, EVAL_MODE="streaming" if name in STREAM_RUNS else "sliding", **TTT_ADAPT, **extra
        )
        with undone(trainer.weights):
            scorer = scorer_of(trainer.model, s, tokens)
            _, records = score_first_ttt(scorer, s)
            after = scorer.score_windows(7)
            found[name] = dict(records=records, after=after, weights=snapshot(trainer.weights))

    found["changed"] = []
    for stream in (torch.as_tensor(tokens), changed(tokens, CHANGED)):
        s = settings(EVAL_MODE="streaming", **TTT_ADAPT)
        with undone(trainer.weights):
            scores = PerTarget()
            score_first_ttt(scorer_of(trainer.model, s, stream, scores), s)
            found["changed"].append(scores.nll)

    def fail_on_the_last():
        if rank == world - 1:
            raise T.RunError(f"rank {rank} failed")

    try:
        T.together(fail_on_the_last)
    except T.RunError as e:
        found["error"] = str(e)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()
