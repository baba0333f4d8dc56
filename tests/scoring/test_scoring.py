"""Every target is scored once, and weights learn only from what has been scored."""

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch

import train_gpt as T
from tests.helpers import (
    PerTarget,
    byte_tables,
    changed,
    learn,
    made_up_tokens,
    random_batch,
    random_model,
    round_trip,
    score_first_ttt,
    scorer_of,
    settings,
    snapshot,
    ttt_of,
    undone,
)


def same(weights, others):
    return all(torch.equal(w, v) for w, v in zip(weights, others, strict=True))


class Plain:
    """In place of a model: forward() of what it is to score."""

    def __init__(self, forward):
        self.forward = forward

    def matrices(self):
        return None

    def context(self, length, cache):
        return None

    def __call__(self, x, y, matrices, context):
        return self.forward(x, y)


# Windows


@pytest.mark.parametrize("window", [1, 2, 16, 33])
def test_every_target_is_scored_once(window):
    for n, stride in product((1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 100, 101), (1, 2, 3, 7, 16, 33)):
        plan, scored = T.plan_windows(n, window, stride).tolist() if stride <= window else [], []
        for i, (start, begin, end) in enumerate(plan):
            assert 0 <= start <= begin < end <= n
            if i == 0:
                assert (start, begin, end) == (0, 0, min(window, n))
            else:
                assert end == start + window  # a later window scores its last targets,
                assert begin - start >= window - stride  # so that each has this much context,
                if i < len(plan) - 1:
                    assert (start % stride, end - begin) == (0, stride)  # `stride` of them, but for the last
            scored += range(begin, end)
        assert scored == list(range(n)) or stride > window


def test_windows_of_known_streams():
    assert T.plan_windows(10, 4, 2).tolist() == [[0, 0, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]
    assert T.plan_windows(11, 4, 3).tolist() == [[0, 0, 4], [3, 4, 7], [6, 7, 10], [7, 10, 11]]
    assert T.plan_windows(8, 4, 4).tolist() == [[0, 0, 4], [4, 4, 8]]
    assert T.plan_windows(3, 4, 2).tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("n, stride", [(20, 8), (32, 8), (33, 32), (100, 5), (101, 8)])
def test_totals_are_those_of_each_window_on_its_own(n, stride):
    s, tokens = settings(), torch.as_tensor(made_up_tokens(n + 1))
    scores, model, expected = PerTarget(), random_model(s), []
    score = scorer_of(model, s, tokens, scores).score_windows(stride)
    with torch.no_grad():
        for start, begin, end in T.plan_windows(n, min(n, 32), stride).tolist():
            window = tokens[None, start : start + min(n, 32) + 1].long()
            expected.append(model(window[:, :-1], window[:, 1:])[0, begin - start : end - start].double())
    torch.testing.assert_close(scores.nll, torch.cat(expected), rtol=0, atol=1e-5)
    assert score.nats == pytest.approx(scores.nll.sum().item(), rel=1e-6)
    tables, size = byte_tables(), 0
    for before, token in zip(tokens[:-1], tokens[1:], strict=True):
        size += tables.base_bytes[token].item()
        size += tables.has_leading_space[token].item() and not tables.is_boundary[before].item()
    assert score[1:] == (n, size)
    assert score.val_loss == pytest.approx(score.nats / n)
    assert score.val_bpb == pytest.approx(score.nats / math.log(2) / size)


def test_scores_do_not_depend_on_the_batch_size():
    s, tokens = settings(), torch.as_tensor(made_up_tokens(110))
    model = random_model(s)
    scores = [
        T.Scorer(model, tokens, byte_tables(), 32, batch_tokens).score_windows(5)
        for batch_tokens in (1, 96, 224, 4096)
    ]
    for score in scores[1:]:
        assert score == pytest.approx(scores[0], rel=1e-6)


def test_batches_have_one_shape():
    shapes = set()

    def forward(x, y):
        shapes.add(tuple(x.shape))
        return torch.zeros(x.shape)

    T.Scorer(Plain(forward), torch.zeros(110, dtype=torch.int32), byte_tables(), 32, 4 * 32).score_windows(5)
    assert shapes == {(4, 32)}


def test_a_later_token_changes_no_score():
    s, tokens = settings(), made_up_tokens(101)

    def nll_of(stream):
        scores = PerTarget()
        scorer_of(random_model(s), s, stream, scores).score_windows(5)
        return scores.nll

    one = nll_of(tokens)
    for i in (0, 1, 5, 31, 32, 33, 77, 99, 100):
        other, before = nll_of(changed(tokens, i)), max(i - 1, 0)  # target i - 1 is token i
        assert torch.equal(one[:before], other[:before]), i
        assert (one[before:] != other[before:]).any(), i


# Chunks


class Learnt(T.NamedTuple):
    targets: list
    read: list  # tokens
    weights: list  # of the targets' losses
    lr: float


class Spy(T.Hooks):
    """Writes down, chunk by chunk, which targets are scored; then what is Learnt from."""

    def __init__(self):
        self.events = []

    def on_chunk_start(self, ttt, chunk):
        self.events.append([])

    def on_scores(self, read, scored, sums):
        self.events[-1] += read.at[scored].tolist()

    def on_read(self, read):
        self.read = read


class Watched(T.Learner):
    """Learns nothing, and notes the part of each loss in what it is asked to learn."""

    def update(self, loss, lr):
        read = self.hooks.read
        (weights,) = torch.autograd.grad(loss, read.losses)
        learnt = weights != 0
        tokens = torch.cat((read.at, read.at[:, -1:] + 1), dim=1)[learnt.any(dim=1)]
        self.hooks.events.append(
            Learnt(read.at[learnt].tolist(), tokens.flatten().tolist(), weights[learnt].tolist(), lr)
        )


def spied(n, **extra):
    """What happens on a stream whose token i is i: targets scored, in a list for each chunk, and Learnt,
    in order; the score; the record of each chunk."""
    s, spy = settings(**extra), Spy()
    model = Plain(lambda x, y: torch.ones(x.shape, requires_grad=True))
    scorer = T.Scorer(model, torch.arange(n + 1).int(), byte_tables(n + 1), s.eval_seq_len, 128, spy)
    found = score_first_ttt(scorer, s, Watched(T.GPT(s), s, spy))
    return spy.events, *found


@pytest.mark.parametrize("n", [33, 64, 97, 150, 193])
@pytest.mark.parametrize("chunk", [16, 40, 64])
@pytest.mark.parametrize("window, stride", [(32, 8), (32, 5), (32, 32), (8, 1), (100, 8), (200, 60)])
def test_weights_learn_only_from_what_was_scored(n, chunk, window, stride):
    events, total, records = spied(n, EVAL_SEQ_LEN=window, EVAL_STRIDE=stride, TTT_CHUNK_TOKENS=chunk)
    scored, learnt = [], []
    for event in events:
        if isinstance(event, Learnt):
            assert {i + 1 for i in event.targets} <= {i + 1 for i in scored}  # target i is token i + 1
            assert max(event.read) <= max(scored) + 1
            assert sum(event.weights) == pytest.approx(1) and len(set(event.weights)) == 1
            learnt += event.targets
        else:
            scored += event
    chunks, whole = math.ceil(n / chunk), chunk // 16 * 16  # whole sequences
    once = [range(c * chunk, c * chunk + whole) for c in range(chunks - 1)]
    assert scored == list(range(n))
    assert learnt == [
        i for part in once for i in [*part] * 3
    ]  # all chunks but the last, in order, in three epochs
    assert len(records) == chunks
    assert total == T.Score(*map(sum, zip(*(score for score, _ in records), strict=True)))
    assert total.tokens == n
    assert [epochs for _, epochs in records] == [3] * (chunks - 1) + [0]


def test_a_window_belongs_to_the_chunk_of_the_first_target_it_scores():
    events, *_ = spied(100, EVAL_SEQ_LEN=32, EVAL_STRIDE=10, TTT_CHUNK_TOKENS=40)
    scored = [event for event in events if not isinstance(event, Learnt)]
    assert scored == [list(range(42)), list(range(42, 82)), list(range(82, 100))]


def test_learning_rate_falls_as_a_cosine():
    events, *_ = spied(200, TTT_CHUNK_TOKENS=40, TTT_LR=0.5, TTT_EPOCHS=1)
    rates = [event.lr for event in events if isinstance(event, Learnt)]
    assert rates == pytest.approx([0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)])


@pytest.mark.parametrize("epochs, expected", [(3, (2, 3, 4)), (1, (1, 1, 2))])
def test_hard_chunks_get_an_epoch_more_and_easy_ones_one_less(epochs, expected):
    def epochs_of(loss, adapt=1):
        values = dict(TTT_ENTROPY_ADAPT=adapt, TTT_ENTROPY_LOW=1.75, TTT_ENTROPY_HIGH=2.1)
        pace = T.Pace(settings(TTT_EPOCHS=epochs, **values), 10, T.Clock())
        return pace.epochs(torch.tensor([100 * loss, 100, 100], dtype=torch.float64))

    assert tuple(map(epochs_of, (1.7, 1.8, 2.2))) == expected
    assert epochs_of(1.75) == epochs_of(2.1) == epochs_of(1, adapt=0) == epochs_of(3, adapt=0) == epochs


# Learning


def learner_of(seed=0, **extra):
    s = settings(**extra)
    return T.Learner(random_model(s, seed), s)


def chunk_tokens(sequences, seed=0):
    return torch.as_tensor(made_up_tokens(16 * sequences + 1, seed))


@pytest.mark.slow
@pytest.mark.parametrize("muon", [0, 1])
def test_ttt_scores_no_target_with_knowledge_of_a_later_token(muon):
    def nll_of(stream):
        s, scores = settings(TTT_MUON=muon, TTT_LR=0.01), PerTarget()
        score_first_ttt(scorer_of(random_model(s), s, stream, scores), s)
        return scores.nll

    tokens = made_up_tokens(151)
    one = nll_of(tokens)
    assert not one.isnan().any()
    for i in (1, 20, 47, 48, 49, 97, 150):
        other = nll_of(changed(tokens, i))
        assert torch.equal(one[: i - 1], other[: i - 1]), i
        assert (one[i - 1 :] != other[i - 1 :]).any(), i


def test_learning_helps():
    """On a stream that says the same thing over and over."""
    s = settings(TTT_LR=0.02)
    scorer = scorer_of(random_model(s), s, torch.arange(240) % 9)
    plain = scorer.score_windows(s.eval_stride)
    ttt, _ = score_first_ttt(scorer, s)
    assert ttt.tokens == plain.tokens
    assert ttt.val_loss < plain.val_loss - 1


@pytest.mark.parametrize("clip", [0, 0.05])
def test_sgd_is_torchs_with_buffers_kept_from_chunk_to_chunk(clip):
    learner, plain = (learner_of(TTT_MUON=0, TTT_BATCH_SEQS=2, TTT_GRAD_CLIP=clip) for _ in range(2))
    sgd = torch.optim.SGD(plain.weights, lr=0, momentum=0.9)
    for lr, tokens in ((0.1, chunk_tokens(3)), (0.05, chunk_tokens(2, seed=1))):
        learn(learner, tokens, epochs=2, lr=lr)
        for _ in range(2):
            for first in range(
                0, len(tokens) - 1, 32
            ):  # batches of two sequences, a last one of what is left
                rows = tokens[first : first + 33].long()
                plain.model(rows[:-1].view(-1, 16), rows[1:].view(-1, 16)).mean().backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(plain.weights, clip)
                sgd.param_groups[0]["lr"] = lr
                sgd.step()
                sgd.zero_grad()
    for w, v, start in zip(learner.weights, plain.weights, learner_of().weights, strict=True):
        torch.testing.assert_close(w - start, v - start, rtol=1e-3, atol=1e-6)


def test_muon_moves_each_matrix_by_its_orthogonalised_gradient_and_the_rest_by_its_own():
    learner = learner_of(TTT_NS_STEPS=2, TTT_GRAD_CLIP=0)
    model, start = learner.model, snapshot(learner.weights)
    tokens = chunk_tokens(2)
    x, y = (t.view(2, 16).long() for t in (tokens[:-1], tokens[1:]))
    grads = torch.autograd.grad(model(x, y).mean(), learner.weights)
    learn(learner, tokens, epochs=1, lr=0.1)
    for w, before, grad in zip(learner.weights, start, grads, strict=True):
        matrices = grad if grad.dim() == 3 else grad[None]
        update = torch.stack([T.newton_schulz(m, 2) for m in matrices]).view_as(w) if grad.dim() > 1 else grad
        torch.testing.assert_close(
            before - w, 0.1 * update.float(), rtol=2e-2, atol=2e-3 if grad.dim() > 1 else 1e-6
        )


@pytest.mark.parametrize("muon", [0, 1])
def test_a_sequence_that_fills_up_a_batch_changes_nothing(muon):
    """Three sequences two at a time, or two and then one on its own, which nothing has to fill up."""
    filled, exact = (learner_of(TTT_MUON=muon, TTT_BATCH_SEQS=2) for _ in range(2))
    tokens = chunk_tokens(3)
    learn(filled, tokens, epochs=1, lr=0.01)
    learn(exact, tokens[:33], epochs=1, lr=0.01)
    learn(exact, tokens[32:], epochs=1, lr=0.01)
    for w, v in zip(filled.weights, exact.weights, strict=True):
        torch.testing.assert_close(w, v, rtol=0, atol=2e-4 if muon else 1e-7)


@pytest.mark.parametrize("muon", [0, 1])
def test_rehearsing_on_made_up_tokens_leaves_no_trace(muon):
    s, tokens, found = settings(TTT_MUON=muon, TTT_LR=0.01), made_up_tokens(151), []
    for rehearsed in (False, True):
        model = random_model(s)
        start, weights = snapshot(model.parameters()), list(model.parameters())
        if rehearsed:
            with undone(weights):
                scorer_of(model, s, tokens[::-1].copy()).score_windows(s.eval_seq_len)
                learn(T.Learner(model, s), torch.as_tensor(tokens[::-1].copy()), epochs=1, lr=0.01)
                assert not same(weights, start)
            assert same(weights, start)
            assert all(p.grad is None for p in weights)
        found.append((score_first_ttt(scorer_of(model, s, tokens), s), weights))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("muon", [0, 1])
@pytest.mark.parametrize("mode", ["sliding", "streaming"])
def test_ttt_goes_on_from_its_state_as_if_it_had_not_ended(mode, muon):
    """Weights, SGD's momenta, keys and values, records and what the pace has come to are carried over."""
    s = settings(EVAL_MODE=mode, TTT_MUON=muon, TTT_LR=0.01, TTT_DECAY=0.01, TTT_ENTROPY_ADAPT=1)
    tokens = made_up_tokens(301)
    whole = ttt_of(scorer_of(random_model(s), s, tokens), s)
    score = whole.run()
    stop = StopIn(3)
    first = ttt_of(scorer_of(random_model(s), s, tokens, stop), s)
    stop.source = first
    with pytest.raises(T.Stopped):
        first.run()
    again = ttt_of(scorer_of(random_model(s), s, tokens), s)
    again.load_state_dict(stop.state)
    assert again.run() == score
    assert same([sums for sums, _ in again.records], [sums for sums, _ in whole.records])
    assert [epochs for _, epochs in again.records] == [epochs for _, epochs in whole.records]
    assert same(again.learner.weights, whole.learner.weights)
    assert same(again.learner.slots, whole.learner.slots) and len(whole.records) > 5
    for key, value in whole.learner.sgd.state_dict()["state"].items():
        assert torch.equal(
            again.learner.sgd.state_dict()["state"][key]["momentum_buffer"], value["momentum_buffer"]
        )


class StopIn(T.Hooks):
    """Keeps the state of `source` before one chunk, and the stages that came out."""

    def __init__(self, chunk=None):
        self.chunk, self.stages, self.state, self.source = chunk, {}, None, None

    def on_stage(self, name, score):
        self.stages[name] = score

    def on_chunk(self, ttt):
        if len(ttt.records) == self.chunk:
            self.state = round_trip(self.source.state_dict())

    def should_stop(self, *, in_loop=False):
        return in_loop and self.state is not None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sliding", "streaming"])
def test_an_evaluation_goes_on_from_its_state(mode):
    """Stages that are done are not scored again, and the clock goes on."""
    s, tokens, found = settings(EVAL_MODE=mode, TTT_LR=0.01), torch.as_tensor(made_up_tokens(301)).int(), []
    state = None
    for chunk in (None, 3, None):
        hooks = StopIn(chunk)
        run = T.Run(s, torch.device("cpu"), hooks)
        evaluation = hooks.source = T.Evaluation(run, random_model(s), tokens, byte_tables())
        if state is not None:
            evaluation.load_state_dict(state)
            assert evaluation.clock.seconds() > state["clock"]["seconds"] > 0
        if chunk:
            with pytest.raises(T.Stopped):
                evaluation.run()
        else:
            evaluation.run()
        state = hooks.state
        found.append((hooks.stages, evaluation.scores))
    (whole, scores), (first, _), (rest, resumed) = found
    assert (
        resumed == scores == {name: tuple(score) for name, score in whole.items()}
        and len(scores) == dict(sliding=3, streaming=2)[mode]
    )
    assert [*first, *rest] == list(whole) and list(rest) == ["legal_ttt"]


@pytest.fixture
def graphs():
    """Gives whether Inductor is to make CUDA graphs of what it compiles; as before afterwards."""
    with torch._inductor.config.patch({"triton.cudagraphs": False}):
        yield lambda: torch._inductor.config.triton.cudagraphs


@pytest.mark.parametrize("mode", ["sliding", "streaming"])
def test_compilation_runs_every_stage_and_leaves_no_trace(mode, capsys, graphs):
    """It learns, too, however little time scoring has; it logs nothing but that it is done."""
    s = settings(EVAL_MODE=mode, EVAL_MAX_SECONDS=0.001, TTT_EPOCHS=1, TTT_CHUNK_TOKENS=32)
    model, learnt = random_model(s), []
    before, update = snapshot(model.parameters()), T.Learner.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T.Learner, "update", lambda *args: learnt.append(1) or update(*args))
        T.compile_scoring(T.Run(s, torch.device("cpu")), model, byte_tables())
    assert len(learnt) == dict(sliding=5, streaming=4)[mode] and same(model.parameters(), before)
    assert all(p.grad is None for p in model.parameters())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("compiled took:")


@pytest.mark.parametrize(
    "given, made",
    [
        (dict(EVAL_MODE="streaming"), True),
        (dict(EVAL_MODE="streaming", AUDIT=1), False),
        (dict(EVAL_MODE="sliding"), False),
    ],
)
def test_streams_that_no_audit_looks_at_become_cuda_graphs(given, made, graphs):
    s = settings(TTT_EPOCHS=1, TTT_CHUNK_TOKENS=32, **given)
    T.compile_scoring(T.Run(s, torch.device("cpu")), random_model(s), byte_tables())
    assert graphs() is made


@pytest.mark.parametrize("fails_always", [False, True])
def test_without_cuda_graphs_if_these_fail(fails_always, graphs, capsys, monkeypatch):
    """It goes on, says why, and leaves the weights as they were; what fails without them, too, is told."""
    s, update = settings(EVAL_MODE="streaming", TTT_EPOCHS=1, TTT_CHUNK_TOKENS=32), T.Learner.update
    model = random_model(s)
    before, updates = snapshot(model.parameters()), []

    def failing(*args):
        update(*args)
        updates.append(graphs())
        if fails_always or graphs():
            raise RuntimeError("capture is not allowed")

    monkeypatch.setattr(T.Learner, "update", failing)
    with pytest.raises(RuntimeError, match="capture") if fails_always else nullcontext():
        T.compile_scoring(T.Run(s, torch.device("cpu")), model, byte_tables())
    assert updates == ([True, False] if fails_always else [True] + 4 * [False])
    assert same(model.parameters(), before) and graphs() is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no_graphs fault:capture is not allowed"
    assert fails_always or (lines[1].startswith("compiled") and lines[1].endswith("graphs:False"))


def test_a_score_that_is_no_number_is_an_error():
    s, model = settings(), random_model(settings())
    with torch.no_grad():
        model.down_bank[1, 2, 3] = math.inf
    run = T.Run(s, torch.device("cpu"))
    with pytest.raises(T.RunError, match="final_int6_roundtrip: the loss is nan; lower TTT_LR"):
        T.Evaluation(run, model, torch.as_tensor(made_up_tokens(101)).int(), byte_tables()).run()


def test_the_model_is_causal():
    model, (x, y) = random_model(settings()), random_batch(1, 16)
    with torch.no_grad():
        nll = model(x, y)
        for i in range(1, 16):
            assert torch.equal(model(changed(x[0], i)[None], y)[:, :i], nll[:, :i])
