"""One pass over the text: each position is computed once, sees the last ones, and is learnt from after it was scored."""

import math
from itertools import islice, product

import pytest
import torch

import train_gpt as T
from helpers import PerTarget, changed, made_up_tokens, random_model, scorer_of, settings, snapshot

STREAMING = dict(EVAL_MODE="streaming", EVAL_SEQ_LEN=24, TTT_CHUNK_TOKENS=16, TTT_LR=0.02, TTT_EPOCHS=1)


def banded(window):
    """Attention over a whole text in which each position sees the last `window` ones: what streaming has to equal."""

    def attention(q, k, v, band=None):
        at = torch.arange(q.size(1))
        sees = (at <= at[:, None]) & (at > at[:, None] - window)
        groups = q.size(2) // k.size(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * q.size(-1) ** -0.5
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2))

    return attention


def one_lane(scorer):
    """A plan that reads the text in one go, and its length."""
    return T.plan_windows(scorer.targets, scorer.targets, 1), scorer.targets


def whole_text_nll(s, tokens, window):
    model = T.GPT(s, banded(window))
    model.load_state_dict(random_model(s).state_dict())
    with torch.no_grad():
        return model(tokens[None, :-1].long(), tokens[None, 1:].long())[0].double()


@pytest.mark.parametrize("n, window", [(40, 24), (97, 24), (200, 24), (201, 7), (130, 64), (30, 64)])
def test_a_stream_scores_like_the_whole_text_at_once(n, window):
    s, tokens = settings(EVAL_SEQ_LEN=window, EVAL_STRIDE=1), torch.as_tensor(made_up_tokens(n + 1))
    scorer = scorer_of(random_model(s), s, tokens, PerTarget)
    scorer.batch = 1  # eight lanes at most, one at a time
    score, whole = scorer.stream_all(), whole_text_nll(s, tokens, window)
    first = (
        n if n < 16 * 2 * window else scorer.targets // 2
    )  # of the first lane, which has all there is before it
    torch.testing.assert_close(scorer.nll[:first], whole[:first], rtol=0, atol=1e-5)
    assert score.tokens == n
    assert score.nats == pytest.approx(scorer.nll.sum().item(), rel=1e-9)


@pytest.mark.parametrize("segment", [1, 5, 16, 24, 50])
def test_the_length_of_a_segment_changes_nothing(segment):
    s, tokens = settings(EVAL_SEQ_LEN=24), torch.as_tensor(made_up_tokens(142))
    scorer = scorer_of(random_model(s), s, tokens, PerTarget)
    scorer.segment = segment
    scorer.score(*one_lane(scorer))
    torch.testing.assert_close(scorer.nll, whole_text_nll(s, tokens, 24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window, segment", [(1, 1), (2, 1), (5, 3), (16, 16)])
def test_every_target_is_scored_once_in_lanes(window, segment):
    """Of as many lanes as fit, however many are read at once; each but the first has a window of context or more."""
    for n, batch in product((1, 2, 15, 16, 17, 100, 257, 1000, 1001), (1, 2, 5)):
        plans = []

        class Planned(T.Scorer):
            def score(self, plan, length, *args):
                plans.append((plan, length))
                return torch.zeros(3)

        scorer = Planned(None, torch.zeros(n + 1, dtype=torch.int32), None, window, batch * window)
        scorer.stream_all()
        (plan, length), scored = plans[0], []
        assert len(plan) <= max(1, min(8 * batch, n // (16 * window)) + 1)
        for i, (start, begin, end) in enumerate(plan.tolist()):
            assert start == begin == 0 if i == 0 else begin >= start + min(window, n)
            assert end <= start + length
            scored += range(begin, end)
        assert scored == list(range(n))


def test_a_lanes_first_window_is_enough_context():
    """The lanes' scores are those of one lane, but for what lies before a window of context."""
    s, tokens = settings(EVAL_SEQ_LEN=16), torch.as_tensor(made_up_tokens(2001))
    one, many = (scorer_of(random_model(s), s, tokens, PerTarget) for _ in range(2))
    one.score(*one_lane(one))
    many.stream_all()
    differs = (one.nll - many.nll).abs() > 1e-5
    assert 0 < differs.sum() < 0.2 * 2000
    assert (one.nll - many.nll).mean().abs() < 1e-3


def test_positions_stay_small_in_a_long_stream():
    """A text that repeats itself is scored alike wherever one is in it, and no rotation goes beyond window and segment."""
    s, tokens = settings(EVAL_SEQ_LEN=16), torch.arange(40 * 64 + 1) % 64
    scorer, longest = scorer_of(random_model(s), s, tokens, PerTarget), []
    tables = T.rotary_tables
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            T, "rotary_tables", lambda length, *args: longest.append(length) or tables(length, *args)
        )
        scorer.score(*one_lane(scorer))
    assert max(longest) == 20
    torch.testing.assert_close(scorer.nll[64:128], scorer.nll[-64:], rtol=0, atol=1e-5)


def test_the_rotary_base_is_that_of_the_window():
    """Beyond 1,024 positions the base depends on the length the model is used at."""
    s, tokens = (
        settings(EVAL_SEQ_LEN=1500, NUM_LAYERS=1, VE_LAYERS="0"),
        torch.as_tensor(made_up_tokens(1701)),
    )
    scorer = scorer_of(random_model(s), s, tokens, PerTarget)
    scorer.score(*one_lane(scorer))
    with (
        torch.no_grad()
    ):  # one layer: a position sees just what its window holds, but for the first two's embedding
        window = tokens[-1501:].long()
        nll = random_model(s)(window[None, :-1], window[None, 1:])[0].double()
    torch.testing.assert_close(scorer.nll[-1:], nll[-1:], rtol=0, atol=1e-3)


# Learning


def stream_ttt(tokens, model_seed=0, **extra):
    s = settings(**STREAMING | extra)
    model = random_model(s, model_seed)
    scorer = scorer_of(model, s, tokens, PerTarget)
    score, records = T.score_first_ttt(scorer, T.Learner(model, s), s)
    return scorer, score, records, model


@pytest.mark.parametrize("n", [10, 24, 25, 39, 40, 41, 100])
def test_ttt_scores_every_target_once(n):
    scorer, score, records, _ = stream_ttt(made_up_tokens(n + 1))
    assert not scorer.nll.isnan().any()
    assert score.tokens == n == sum(score.tokens for score, _ in records)
    assert score.nats == pytest.approx(scorer.nll.sum().item(), rel=1e-9)
    chunks = 1 + math.ceil(max(0, n - 24) / 16)
    assert [epochs for _, epochs in records] == [0] + [1] * (chunks - 2) + [0] * (chunks > 1)


def test_without_a_step_ttt_scores_as_one_stream():
    tokens = torch.as_tensor(made_up_tokens(151))
    scorer, *_ = stream_ttt(tokens, TTT_LR=0)
    torch.testing.assert_close(
        scorer.nll, whole_text_nll(settings(**STREAMING), tokens, 24), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("muon", [0, 1])
def test_ttt_scores_no_target_with_knowledge_of_a_later_token(muon):
    def nll_of(stream):
        return stream_ttt(stream, TTT_MUON=muon, TTT_EPOCHS=2, TTT_DECAY=0.01)[0].nll

    tokens = torch.as_tensor(made_up_tokens(151))
    one = nll_of(tokens)
    for i in (1, 23, 24, 25, 39, 40, 41, 100, 150):
        other = nll_of(changed(tokens, i))
        assert torch.equal(one[: i - 1], other[: i - 1]), i
        assert (one[i - 1 :] != other[i - 1 :]).any(), i


@pytest.mark.parametrize("mode", ["windowed", "streamed"])
def test_chunks_may_begin_where_others_have_ended(mode):
    s, tokens, chunks = (
        settings(**STREAMING),
        torch.as_tensor(made_up_tokens(151)),
        getattr(T, f"{mode}_chunks"),
    )
    scorer = scorer_of(random_model(s), s, tokens)
    whole = [score for score, _ in chunks(scorer, T.Learner(scorer.model, s), s)]
    learner = T.Learner(scorer.model, s)
    parts = [score for score, _ in islice(chunks(scorer, learner, s), 3)]
    parts += [score for score, _ in chunks(scorer, learner, s, 3)]
    assert len(whole) > 5 and torch.equal(torch.stack(parts), torch.stack(whole))


def test_weights_learn_only_from_scores_that_are_recorded():
    """What a step goes down is made of the very scores that were recorded before it."""
    s, events = settings(**STREAMING), []
    model = random_model(s)

    class Spy(PerTarget):
        def measure(self, nll, at, begin, end):
            events.append(nll)
            return super().measure(nll, at, begin, end)

    class Watched(T.Learner):
        def update(self, loss, lr):
            assert loss.item() == pytest.approx(events[-1].sum().item() / 16, rel=1e-6)
            assert not events[-1].requires_grad
            events.append("update")
            super().update(loss, lr)

    T.score_first_ttt(scorer_of(model, s, made_up_tokens(101), Spy), Watched(model, s), s)
    kinds = ["update" if isinstance(event, str) else "score" for event in events]
    assert kinds == ["score"] + ["score", "update"] * 4 + [
        "score"
    ]  # a window, chunks, and the last one, which nothing follows


def test_a_chunk_is_learnt_from_with_the_past_before_it():
    """One chunk's step is that of plain backpropagation through the whole text, keys and values of the past held fixed."""
    s, tokens = (
        settings(**STREAMING | dict(TTT_MUON=0, TTT_GRAD_CLIP=0, TTT_LR=0.1)),
        torch.as_tensor(made_up_tokens(57)),
    )
    model = random_model(s)
    start, text = snapshot(model.parameters()), tokens.long()
    past = model.no_past(1)
    first = torch.cat((torch.tensor([-1, -1]), text[:24]))[None]
    model(first, text[None, 1:25], None, past)
    nll = model(text[None, 22:40], text[None, 25:41], None, past)
    grads = torch.autograd.grad(nll.mean(), list(model.parameters()))
    seen = []

    class Once(T.Learner):
        def update(self, loss, lr):
            super().update(loss, lr)
            seen.append(snapshot(self.weights))

    T.score_first_ttt(scorer_of(model, s, tokens), Once(model, s), s)
    for w, before, grad in zip(seen[0], start, grads):
        torch.testing.assert_close(before - w, 0.1 * grad, rtol=1e-4, atol=1e-6)


def test_decay_pulls_back_to_the_first_weights():
    ends = []
    for decay in (0, 0.05, 1):
        *_, model = stream_ttt(made_up_tokens(201), TTT_DECAY=decay)
        start = random_model(settings(**STREAMING))
        ends.append(
            sum((w - v).square().sum() for w, v in zip(model.parameters(), start.parameters())).sqrt().item()
        )
    assert ends[0] > 1.1 * ends[1] > 1.1 * ends[2] > 0


def test_learning_while_streaming_helps():
    tokens = torch.arange(400) % 9
    _, plain, _, _ = stream_ttt(tokens, TTT_LR=0)
    _, ttt, _, _ = stream_ttt(tokens, TTT_LR=0.02)
    assert ttt.tokens == plain.tokens
    assert ttt.val_loss < plain.val_loss - 1


def test_a_stream_compiles_once_for_its_start_and_once_for_the_rest():
    """On a GPU each graph costs part of the time; a run's warm-up makes both."""
    tokens, found = made_up_tokens(24 + 5 * 16 + 1), []
    for compiled in (False, True):
        s = settings(**STREAMING)
        model = random_model(s)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model.compile(backend="eager", dynamic=False, fullgraph=True)
        scorer = scorer_of(model, s, tokens, PerTarget)
        T.score_first_ttt(scorer, T.Learner(model, s), s)
        found.append(scorer.nll)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


# A budget of time


class Clock:
    """Time that passes as scoring and learning are called, in place of the machine's."""

    def __init__(self, patch, scoring, learning):
        self.now = 0.0
        for name in ("windowed_chunks", "streamed_chunks"):
            patch.setattr(T, name, self.slowed(getattr(T, name), scoring, learning))

    def slowed(self, chunks, scoring, learning):
        def run(*args):
            for c, (score, learn) in enumerate(chunks(*args)):
                self.now += scoring(c)

                def slow(epochs):
                    self.now += epochs * learning(c)
                    learn(epochs)

                yield score, learn and slow

        return run

    def __call__(self):
        return self.now


@pytest.fixture
def slow_ttt(monkeypatch):
    """run(limit, scoring, learning, ...) -> (seconds it took, the epochs of each chunk, tokens scored)."""

    def run(limit, scoring, learning, n=424, **extra):
        s = settings(**STREAMING | dict(EVAL_MAX_SECONDS=limit, TTT_LR=0, TRAIN_SEQ_LEN=16) | extra)
        model = T.GPT(s).initialize()
        with monkeypatch.context() as patch:
            clock = Clock(patch, scoring, learning)
            score, records = T.score_first_ttt(
                scorer_of(model, s, made_up_tokens(n + 1)), T.Learner(model, s), s, clock
            )
        return clock.now, [epochs for _, epochs in records], score.tokens

    return run


@pytest.mark.parametrize("mode", ["streaming", "sliding"])
def test_time_that_suffices_changes_nothing(slow_ttt, mode):
    seconds, epochs, tokens = slow_ttt(1000, lambda c: 1, lambda c: 2, EVAL_MODE=mode, TTT_EPOCHS=2)
    assert tokens == 424
    assert set(epochs[mode == "streaming" : -1]) == {2}


@pytest.mark.parametrize("mode", ["streaming", "sliding"])
@pytest.mark.parametrize("limit, least", [(90, 0.6), (60, 0.25), (40, 0.05)])
def test_less_is_learnt_so_that_all_is_scored_in_time(slow_ttt, mode, limit, least):
    """26 or 27 chunks, a second to score each, three to learn from one: about 105 s without a limit."""
    seconds, epochs, tokens = slow_ttt(limit, lambda c: 1, lambda c: 3, EVAL_MODE=mode)
    assert tokens == 424
    assert 0.85 * limit < seconds <= limit
    assert sum(epochs) > least * len(epochs)
    gaps = [i for i, e in enumerate(epochs) if e]  # spread over the text, not used up at its start
    assert gaps[-1] > 0.7 * len(epochs)


def test_a_machine_that_slows_down_still_scores_all_in_time(slow_ttt):
    seconds, epochs, tokens = slow_ttt(100, lambda c: 1 if c < 10 else 2.5, lambda c: 3)
    assert tokens == 424
    assert seconds <= 100
    assert sum(epochs[:10]) > 1.5 * sum(epochs[-10:])


def test_scoring_is_never_skipped_even_if_time_is_short_for_it_alone(slow_ttt):
    seconds, epochs, tokens = slow_ttt(10, lambda c: 1, lambda c: 3)
    assert tokens == 424
    assert sum(epochs) <= 2
    assert seconds <= 10 + 26


def test_the_clock_is_read_at_some_200_chunks_only():
    reads, s = (
        [],
        settings(
            **STREAMING | dict(EVAL_SEQ_LEN=8, TTT_CHUNK_TOKENS=8, NUM_LAYERS=1, VE_LAYERS="0", TTT_MUON=0)
        ),
    )
    model = T.GPT(s).initialize()
    T.score_first_ttt(
        scorer_of(model, s, made_up_tokens(401 * 8)), T.Learner(model, s), s, lambda: reads.append(0) or 0.0
    )
    assert len(reads) == 1 + 3 * 201


# Settings


def test_a_recipe_is_a_set_of_defaults_that_single_settings_override():
    best = T.parse_settings({"RECIPE": "best"})
    assert {name: getattr(best, name) for name in T.BEST} == T.BEST
    assert best.eval_mode == "streaming"
    mixed = T.parse_settings({"RECIPE": "best", "TTT_LR": "0.5", "EVAL_MODE": "sliding"})
    assert (mixed.ttt_lr, mixed.eval_mode, mixed.ttt_decay) == (0.5, "sliding", T.BEST["ttt_decay"])
    assert vars(T.parse_settings({"RECIPE": "record"})) == vars(T.parse_settings({}))


def test_a_recipe_wins_over_what_an_artifact_was_made_with():
    kept = vars(T.parse_settings({"RECIPE": "best", "EVAL_SEQ_LEN": "128"}))
    again = T.parse_settings({}, kept)
    assert vars(again) == kept
    record = T.parse_settings({"RECIPE": "record"}, kept)
    assert (record.eval_mode, record.ttt_lr, record.eval_seq_len) == ("sliding", 0.002, 128)


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(RECIPE="beste"), "RECIPE in"),
        (dict(EVAL_MODE="stream"), "EVAL_MODE =="),
        (dict(EVAL_MODE="streaming", TTT_CHUNK_TOKENS="100"), "TTT_CHUNK_TOKENS % 8 == 0"),
    ],
)
def test_impossible_choices_are_named(bad, said):
    with pytest.raises(T.RunError, match=said.replace("(", r"\(")):
        T.parse_settings(bad)
