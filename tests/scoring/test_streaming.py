"""One pass over the text: each position is computed once, sees the last ones, and is learnt from after it
was scored."""

import math
import re
from unittest.mock import patch

import pytest
import torch

import train_gpt as T
from tests.helpers import (
    FRONTIER,
    PerTarget,
    attention_by,
    byte_tables,
    changed,
    made_up_tokens,
    random_model,
    score_first_ttt,
    score_stream,
    scorer_of,
    settings,
    snapshot,
    with_documents,
)

STREAMING = dict(EVAL_MODE="streaming", EVAL_SEQ_LEN=24, TTT_CHUNK_TOKENS=16, TTT_LR=0.02, TTT_EPOCHS=1)


def banded(window):
    """Attention over a whole text in which each position sees the last `window` ones: what streaming has
    to equal."""

    def attention(q, k, v, mask=None):
        at = torch.arange(q.size(1))
        sees = (at <= at[:, None]) & (at > at[:, None] - window)
        groups = q.size(2) // k.size(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * q.size(-1) ** -0.5
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2))

    return attention


def whole_text_nll(s, tokens, window):
    model = random_model(s)
    with torch.no_grad(), attention_by(banded(window)):
        return model(tokens[None, :-1].long(), tokens[None, 1:].long())[0].double()


def test_what_was_read_may_be_overwritten_by_the_next_read(monkeypatch):
    """As CUDA graphs do, which give each result in the same place."""
    s, tokens = settings(**STREAMING | dict(TTT_EPOCHS=3)), torch.as_tensor(made_up_tokens(201)).int()
    read, places = T.Scorer.read, {}

    def in_one_place(scorer, at, matrices, cache=None):
        found = read(scorer, at, matrices, cache)
        for i, slot in enumerate(cache):
            place = places.setdefault((i, slot.shape), torch.empty_like(slot))
            cache[i] = place.copy_(slot)
        return found

    def score():
        return score_first_ttt(scorer_of(random_model(s), s, tokens), s)

    plain = score()
    monkeypatch.setattr(T.Scorer, "read", in_one_place)
    assert score() == plain and places


@pytest.mark.parametrize("n, window", [(40, 24), (97, 24), (200, 24), (201, 7), (130, 64), (30, 64)])
@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_a_stream_scores_like_the_whole_text_at_once(n, window, chunk):
    """Whatever is read at once."""
    s, tokens = settings(EVAL_SEQ_LEN=window, EVAL_STRIDE=1), torch.as_tensor(made_up_tokens(n + 1))
    scores = PerTarget()
    score = score_stream(scorer_of(random_model(s), s, tokens, scores), s, chunk)
    torch.testing.assert_close(scores.nll, whole_text_nll(s, tokens, window), rtol=0, atol=1e-5)
    assert score.tokens == n
    assert score.nats == pytest.approx(scores.nll.sum().item(), rel=1e-9)


@pytest.mark.parametrize("looping", [True, False])
@pytest.mark.parametrize("every, window", [(19, 24), (60, 24), (60, 48)])
def test_the_frontiers_stream_scores_like_the_whole_text_at_once(looping, every, window):
    """With loops, lanes, gates, a smear and documents, shorter and longer than a window, which is shorter and
    longer than what was trained at once."""
    s, by = settings(**FRONTIER | dict(EVAL_SEQ_LEN=window)), banded(window)
    model, tokens = random_model(s), with_documents(made_up_tokens(120), every)
    model.looping, scores = looping, PerTarget()

    def in_pieces(q, k, v, pieces, longest):
        lengths = [length for length in pieces.diff().tolist() if length]
        parts = zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
        return torch.cat([by(*part) for part in parts], dim=1)

    scorer = T.Scorer(model, tokens.int(), byte_tables(), window, 64, scores)
    score_stream(scorer, s, chunk=7)
    with torch.no_grad(), patch.object(T, "piece_attention", in_pieces):
        whole = model(tokens[None, :-1].long(), tokens[None, 1:].long())[0].double()
    torch.testing.assert_close(scores.nll, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", [dict(), dict(LOOP_COUNT=0), dict(PARALLEL_FROM=-1), dict(SMEAR="channel")])
def test_no_frontier_score_knows_a_later_token_or_another_document(part):
    """In windows and in a stream. (The smear by channel looks one token back, whatever that is.)"""
    s, tokens = settings(**FRONTIER | part), with_documents(made_up_tokens(96), every=24)

    def nll_of(text, stream):
        scores = PerTarget()
        scorer = scorer_of(random_model(s), s, text, scores)
        with torch.no_grad():
            score_stream(scorer, s, chunk=16) if stream else scorer.score_windows(5)
        return scores.nll

    for stream in (False, True):
        one = nll_of(tokens, stream)
        for i in (5, 30, 47, 70):
            other = nll_of(changed(tokens, i), stream)
            end = 24 * (i // 24 + 1)
            assert torch.equal(one[: i - 1], other[: i - 1])
            assert (one[i - 1 : end - 1] != other[i - 1 : end - 1]).any()
            assert torch.equal(one[end:], other[end:]) or "SMEAR" in part


@pytest.mark.parametrize("order", [(0, 1, 1, 2), (0, 1, 2, 1, 2), (2, 0)], ids=str)
def test_a_layer_that_is_executed_twice_has_two_slots_of_the_past(order):
    """A slot an execution: the second one does not see what the first has left."""
    s, tokens = settings(EVAL_SEQ_LEN=24), torch.as_tensor(made_up_tokens(142))
    whole, scores = random_model(s), PerTarget()
    scorer = scorer_of(random_model(s), s, tokens, scores)
    for model in (scorer.model, whole):
        model.looped_order = list(order)
        model.skip_weights = torch.nn.Parameter(torch.full((len(order) // 2, s.model_dim), 0.7))
    assert len(scorer.model.empty_cache(1)) == len(order)
    score_stream(scorer, s)
    with torch.no_grad(), attention_by(banded(24)):
        nll = whole(tokens[None, :-1].long(), tokens[None, 1:].long())[0].double()
    torch.testing.assert_close(scores.nll, nll, rtol=0, atol=1e-5)
    assert not torch.allclose(nll, whole_text_nll(s, tokens, 24), atol=1e-3)


def length_of(cache):
    """How many positions of the past it holds."""
    (length,) = {slot.size(2) for slot in cache}
    return length


def test_a_caches_copy_goes_on_on_its_own():
    s, tokens = settings(EVAL_SEQ_LEN=24), torch.as_tensor(made_up_tokens(142)).long()[None]
    model = random_model(s)
    start = torch.cat((torch.tensor([[-1, -1]]), tokens[:, :24]), dim=1)

    @torch.no_grad()
    def read(cache, low):
        return model(
            tokens[:, low - 2 : low + 10],
            tokens[:, low + 1 : low + 11],
            context=model.context(tokens[:, low - 24 : low + 10], cache),
        )

    with torch.no_grad():
        cache = model.empty_cache(1)
        assert length_of(cache) == 0
        model(start, tokens[:, 1:25], context=model.context(tokens[:, :24], cache))
    assert length_of(cache) == 24
    copy, slots, values = (list(cache), list(cache), [slot.clone() for slot in cache])
    first = read(cache, 24)
    assert length_of(cache) == length_of(copy) == 24
    assert all(own is kept for own, kept in zip(copy, slots, strict=True))
    assert all(map(torch.equal, copy, values))
    assert not any(map(torch.equal, cache, values))
    second = read(cache, 34)
    assert torch.equal(read(copy, 24), first) and torch.equal(read(copy, 34), second)


def test_a_lane_of_a_cache_is_that_of_its_stream():
    s, tokens = settings(EVAL_SEQ_LEN=24), torch.as_tensor(made_up_tokens(142)).long()
    scorer = scorer_of(random_model(s), s, tokens)
    at, cache = torch.tensor([[0], [40], [7]]) + torch.arange(24), scorer.model.empty_cache(3)
    with torch.no_grad():
        scorer.read(at, scorer.model.matrices(), cache)
        lane = [slot[:, 1:2] for slot in cache]
        assert [slot.shape[1] for slot in lane] == [1] * len(cache)
        losses = scorer.read(at + 24, scorer.model.matrices(), cache).losses
        own = scorer.read(at[1:2] + 24, scorer.model.matrices(), lane).losses
    torch.testing.assert_close(own, losses[1:2], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_positions_stay_small_in_a_long_stream():
    """A text that repeats itself is scored alike wherever one is in it, and no rotation goes beyond window
    and segment."""
    s, tokens = settings(EVAL_SEQ_LEN=16), torch.arange(40 * 64 + 1) % 64
    scores = PerTarget()
    scorer = scorer_of(random_model(s), s, tokens, scores)
    score_stream(scorer, s, chunk=4)
    tables = scorer.model.rotary
    assert max(len(cos) for cos, _ in tables.values()) == max(length for length, _ in tables) == 20
    torch.testing.assert_close(scores.nll[64:128], scores.nll[-64:], rtol=0, atol=1e-5)


def test_the_rotary_base_is_that_of_the_window():
    """Beyond 1,024 positions the base depends on the length the model is used at."""
    s, tokens = (
        settings(EVAL_SEQ_LEN=1500, NUM_LAYERS=1, VE_LAYERS="0"),
        torch.as_tensor(made_up_tokens(1701)),
    )
    scores = PerTarget()
    scorer = scorer_of(random_model(s), s, tokens, scores)
    score_stream(scorer, s, chunk=100)
    with (
        torch.no_grad()
    ):  # one layer: a position sees just what its window holds, but for the first two's embedding
        window = tokens[-1501:].long()
        nll = random_model(s)(window[None, :-1], window[None, 1:])[0].double()
    torch.testing.assert_close(scores.nll[-1:], nll[-1:], rtol=0, atol=1e-3)


# Learning


def stream_ttt(tokens, model_seed=0, **extra):
    s = settings(**STREAMING | extra)
    model, scores = random_model(s, model_seed), PerTarget()
    score, records = score_first_ttt(scorer_of(model, s, tokens, scores), s)
    return scores, score, records, model


@pytest.mark.parametrize("n", [10, 24, 25, 39, 40, 41, 100])
def test_ttt_scores_every_target_once(n):
    scores, score, records, _ = stream_ttt(made_up_tokens(n + 1))
    assert not scores.nll.isnan().any()
    assert score.tokens == n == sum(score.tokens for score, _ in records)
    assert score.nats == pytest.approx(scores.nll.sum().item(), rel=1e-9)
    chunks = 1 + math.ceil(max(0, n - 24) / 16)
    assert [epochs for _, epochs in records] == [0] + [1] * (chunks - 2) + [0] * (chunks > 1)


def test_without_a_step_ttt_scores_as_one_stream():
    tokens = torch.as_tensor(made_up_tokens(151))
    scores, *_ = stream_ttt(tokens, TTT_LR=0)
    torch.testing.assert_close(
        scores.nll, whole_text_nll(settings(**STREAMING), tokens, 24), rtol=0, atol=1e-5
    )


@pytest.mark.slow
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


@pytest.mark.parametrize("mode", ["sliding", "streaming"])
def test_chunks_may_begin_where_others_have_ended(mode):
    s, tokens = settings(**STREAMING | dict(EVAL_MODE=mode)), torch.as_tensor(made_up_tokens(151))
    scorer = scorer_of(random_model(s), s, tokens)

    def scored(learner, first, end):
        chunks = T.EVAL_MODES[mode](s, scorer, learner)
        return [chunks.score_chunk(c) for c in range(first, min(end, chunks.chunks))]

    whole, learner = scored(T.Learner(scorer.model, s), 0, 99), T.Learner(scorer.model, s)
    parts = scored(learner, 0, 3) + scored(learner, 3, 99)
    assert len(whole) > 5 and torch.equal(torch.stack(parts), torch.stack(whole))


class Order(T.Hooks):
    """Keeps what is read, scored and learnt from, in order."""

    def __init__(self):
        self.events = []

    def on_read(self, read):
        self.events.append(("read", read))

    def on_scores(self, read, scored, sums):
        self.events.append(("score", read.losses.detach().clone(), sums))

    def before_update(self, learner):
        self.events.append(("update", learner))

    def on_update(self, learner):
        self.events.append(("updated", snapshot(learner.weights)))


def test_weights_learn_only_from_scores_that_are_recorded():
    """What a step goes down is made of the very scores that were recorded before it."""
    s, order = settings(**STREAMING), Order()
    model = random_model(s)

    class Watched(T.Learner):
        def update(self, loss, lr):
            what, losses, sums = order.events[-1]
            assert what == "score" and losses.sum().item() == pytest.approx(sums[0].item(), rel=1e-6)
            assert loss.item() == pytest.approx(losses.sum().item() / 16, rel=1e-6)
            assert lr == s.ttt_lr
            super().update(loss, lr)

    score_first_ttt(scorer_of(model, s, made_up_tokens(101), order), s, Watched(model, s, order))
    kinds = [event[0] for event in order.events if event[0] != "updated"]
    scored = ["read", "score"]  # a window, chunks, and the last one, which nothing follows
    assert kinds == scored + [*scored, "update"] * 4 + scored  # nothing is read again


def test_a_chunk_is_learnt_from_with_the_past_before_it():
    """One chunk's step is that of plain backpropagation through the whole text, keys and values of the
    past held fixed."""
    s, tokens = (
        settings(**STREAMING | dict(TTT_MUON=0, TTT_GRAD_CLIP=0, TTT_LR=0.1)),
        torch.as_tensor(made_up_tokens(57)),
    )
    model = random_model(s)
    start, text = snapshot(model.parameters()), tokens.long()
    cache = model.empty_cache(1)
    first = torch.cat((torch.tensor([-1, -1]), text[:24]))[None]
    model(first, text[None, 1:25], None, model.context(text[None, :24], cache))
    nll = model(text[None, 22:40], text[None, 25:41], None, model.context(text[None, :40], cache))
    grads = torch.autograd.grad(nll.mean(), list(model.parameters()))
    order = Order()
    score_first_ttt(scorer_of(model, s, tokens, order), s)
    seen = [event[1] for event in order.events if event[0] == "updated"]
    for w, before, grad in zip(seen[0], start, grads, strict=True):
        torch.testing.assert_close(before - w, 0.1 * grad, rtol=1e-4, atol=1e-6)


def test_decay_pulls_back_to_the_first_weights():
    ends = []
    for decay in (0, 0.05, 1):
        *_, model = stream_ttt(made_up_tokens(201), TTT_DECAY=decay)
        start = random_model(settings(**STREAMING))
        ends.append(
            sum((w - v).square().sum() for w, v in zip(model.parameters(), start.parameters(), strict=True))
            .sqrt()
            .item()
        )
    assert ends[0] > 1.1 * ends[1] > 1.1 * ends[2] > 0


def test_learning_while_streaming_helps():
    tokens = torch.arange(400) % 9
    _, plain, _, _ = stream_ttt(tokens, TTT_LR=0)
    _, ttt, _, _ = stream_ttt(tokens, TTT_LR=0.02)
    assert ttt.tokens == plain.tokens
    assert ttt.val_loss < plain.val_loss - 1


@pytest.mark.slow
def test_a_stream_compiles_once_for_its_start_and_once_for_the_rest():
    """On a GPU each graph costs part of the time; a run's warm-up makes both."""
    tokens, found, codes = made_up_tokens(24 + 5 * 16 + 1), [], []

    def eager(graph, inputs):
        codes.append(graph.code)
        return graph.forward

    for compiled in (False, True):
        s = settings(**STREAMING)
        model = random_model(s)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model.compile(backend=eager, dynamic=False, fullgraph=True)
        scores = PerTarget()
        score_first_ttt(scorer_of(model, s, tokens, scores), s)
        found.append(scores.nll)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(codes) == 2
    assert all("tanh(" in code for code in codes)
    assert not any(
        re.search(r"\b(cos|sin|outer|arange)\(", code) for code in codes
    )  # tables and masks are handed in
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


# A budget of time


class Told(T.Clock):
    """Goes on only when told to, and counts how often it is read."""

    def __init__(self):
        super().__init__()
        self.now, self.reads = 0.0, 0

    def seconds(self):
        self.reads += 1
        return self.now


def slowed(mode, clock, scoring, learning):
    """The mode, whose chunk c takes scoring(c) seconds to score and learning(c) to learn from once."""

    class Slow(mode):
        def score_chunk(self, chunk):
            clock.now += scoring(chunk)
            return super().score_chunk(chunk)

        def learn_chunk(self, chunk, epochs):
            clock.now += epochs * learning(chunk)
            super().learn_chunk(chunk, epochs)

    return Slow


def slow_ttt(limit, scoring, learning, n=424, **extra):
    """Seconds it took, the epochs of each chunk, tokens scored."""
    s, clock = (
        settings(**STREAMING | dict(EVAL_MAX_SECONDS=limit, TTT_LR=1e-9, TRAIN_SEQ_LEN=16) | extra),
        Told(),
    )
    scorer = scorer_of(T.GPT(s).initialize(), s, made_up_tokens(n + 1))
    mode = slowed(T.EVAL_MODES[s.eval_mode], clock, scoring, learning)
    ttt = T.TestTimeTraining(mode(s, scorer, T.Learner(scorer.model, s)), clock)
    score = ttt.run()
    return clock.now, [epochs for _, epochs in ttt.records], score.tokens


@pytest.mark.parametrize("mode", ["streaming", "sliding"])
def test_time_that_suffices_changes_nothing(mode):
    seconds, epochs, tokens = slow_ttt(1000, lambda c: 1, lambda c: 2, EVAL_MODE=mode, TTT_EPOCHS=2)
    assert tokens == 424
    assert set(epochs[mode == "streaming" : -1]) == {2}


@pytest.mark.parametrize("mode", ["streaming", "sliding"])
@pytest.mark.parametrize("limit, least", [(90, 0.6), (60, 0.25), (40, 0.05)])
def test_less_is_learnt_so_that_all_is_scored_in_time(mode, limit, least):
    """26 or 27 chunks, a second to score each, three to learn from one: about 105 s without a limit."""
    seconds, epochs, tokens = slow_ttt(limit, lambda c: 1, lambda c: 3, EVAL_MODE=mode)
    assert tokens == 424
    assert 0.85 * limit < seconds <= limit
    assert sum(epochs) > least * len(epochs)
    gaps = [i for i, e in enumerate(epochs) if e]  # spread over the text, not used up at its start
    assert gaps[-1] > 0.7 * len(epochs)


def test_a_machine_that_slows_down_still_scores_all_in_time():
    seconds, epochs, tokens = slow_ttt(100, lambda c: 1 if c < 10 else 2.5, lambda c: 3)
    assert tokens == 424
    assert seconds <= 100
    assert sum(epochs[:10]) > 1.5 * sum(epochs[-10:])


def test_scoring_is_never_skipped_even_if_time_is_short_for_it_alone():
    seconds, epochs, tokens = slow_ttt(10, lambda c: 1, lambda c: 3)
    assert tokens == 424
    assert sum(epochs) <= 2
    assert seconds <= 10 + 26


@pytest.mark.slow
def test_the_clock_is_read_at_some_200_chunks_only():
    sizes = dict(EVAL_SEQ_LEN=8, TTT_CHUNK_TOKENS=8, NUM_LAYERS=1, VE_LAYERS="0", TTT_MUON=0)
    s, clock = settings(**STREAMING | sizes), Told()
    score_first_ttt(scorer_of(T.GPT(s).initialize(), s, made_up_tokens(401 * 8)), s, clock=clock)
    assert clock.reads == 1 + 3 * 201


def test_what_the_pace_has_come_to_is_carried_over():
    s, clock = settings(**STREAMING | dict(EVAL_MAX_SECONDS=50, TTT_EPOCHS=2)), Told()
    pace, sums = T.Pace(s, 30, clock), torch.tensor([1.0, 1.0, 1.0])
    for c in range(4):
        start = pace.time(c)
        clock.now += 1
        scored, epochs = pace.time(c), pace.epochs(sums)
        clock.now += 1.7 * epochs
        pace.end(c, start, scored, epochs)
    assert 0 < pace.rate < 1 and pace.credit % 1 > 0
    again = T.Pace(s, 30, Told())
    again.load_state_dict(pace.state_dict())
    assert [again.epochs(sums) for _ in range(20)] == [pace.epochs(sums) for _ in range(20)]
    assert (again.scoring, again.learning) == (1, pytest.approx(1.7))


# Settings


def test_a_recipe_is_a_set_of_defaults_that_single_settings_override():
    frontier = T.parse_settings({"RECIPE": "frontier"})
    assert {name: getattr(frontier, name) for name in T.RECIPES["frontier"]} == T.RECIPES["frontier"]
    assert (frontier.eval_mode, frontier.loop_layers, frontier.vocab_size) == ("streaming", (3, 4, 5), 8192)
    mixed = T.parse_settings({"RECIPE": "frontier", "TTT_LR": "0.5", "EVAL_STRIDE": "9"})
    assert (mixed.ttt_lr, mixed.eval_stride, mixed.ttt_decay) == (0.5, 9, T.RECIPES["frontier"]["ttt_decay"])
    assert vars(T.parse_settings({"RECIPE": "record"})) == vars(T.parse_settings({}))


def test_a_recipe_wins_over_what_an_artifact_was_made_with():
    kept = vars(T.parse_settings({"EVAL_MODE": "streaming", "TTT_LR": "0.5", "EVAL_STRIDE": "128"}))
    again = T.parse_settings({}, kept)
    assert vars(again) == kept
    record = T.parse_settings({"RECIPE": "record"}, kept)
    assert (record.eval_mode, record.ttt_lr, record.eval_stride) == ("sliding", 0.002, 128)


def test_an_artifact_of_one_recipe_is_not_scored_by_the_model_of_another():
    kept = vars(T.parse_settings({"RECIPE": "frontier"}))
    with pytest.raises(T.RunError, match="MLP_MULT=3, but the artifact has 4"):
        T.parse_settings({"RECIPE": "record"}, kept)


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(RECIPE="beste"), "RECIPE='beste': allowed is record or frontier"),
        (dict(EVAL_MODE="stream"), "EVAL_MODE='stream': allowed is sliding or streaming"),
    ],
)
def test_impossible_choices_are_named(bad, said):
    with pytest.raises(T.RunError, match=said):
        T.parse_settings(bad)
