"""Experts that read a text each on their own, and the mixture of what they say."""

import math
import re

import pytest
import torch

import train_gpt as T
from tests import tiny
from tests.helpers import (
    PerTarget,
    byte_tables,
    changed,
    made_up_tokens,
    random_model,
    round_trip,
    settings,
    with_documents,
)

STREAMING = dict(EVAL_MODE="streaming", EVAL_SEQ_LEN=24, TTT_CHUNK_TOKENS=16, TTT_LR=0.02, TTT_EPOCHS=1)
EXPERTS = "lr=0;lr=0.05,chunk=8;lr=0.02,decay=0.1;lr=0.01,epochs=2"


def evaluation_of(tokens, hooks=T.NO_HOOKS, **extra):
    """An Evaluation of a random model, to be run."""
    s = settings(**STREAMING | extra)
    run = T.Run(s, torch.device("cpu"), hooks)
    run.log.outputs.clear()
    return T.Evaluation(run, random_model(s), torch.as_tensor(tokens).int(), byte_tables())


def alone(tokens, **extra):
    """The nll of each target of a plain run of test-time training, and its Score."""
    scores, s = PerTarget(), settings(**STREAMING | extra)
    scorer = T.Scorer(
        random_model(s), torch.as_tensor(tokens).int(), byte_tables(), s.eval_seq_len, 64, scores
    )
    score = T.TestTimeTraining(T.StreamingMode(s, scorer, T.Learner(scorer.model, s, scores))).run()
    return scores.nll, score


class Mixed(T.Hooks):
    """Keeps what was mixed, and who has read all."""

    def __init__(self):
        self.nll, self.losses, self.experts = None, None, []

    def on_mixture(self, ensemble, members, mixed, weights):
        self.nll, self.losses, self.names = mixed, torch.stack([*members.values()]), list(members)

    def on_expert(self, ttt):
        self.experts.append(ttt)


def mixture_of(tokens, **extra):
    """The nll of each target (N,), of each expert (E, N), the Score."""
    mixed = Mixed()
    score = evaluation_of(tokens, mixed, **extra).ttt.run()
    return mixed.nll, mixed.losses, score


def mixed_target_by_target(losses, share, look_back, block):
    """As it is told: Bayes' rule, an average of what came of it, a share that goes back there."""
    number = len(losses)
    mixed, before = [], []
    for t, column in enumerate(losses.double().T.tolist()):
        if t % block == 0:
            weights = average = [1 / number] * number
        before.append(weights)
        joint = [w * math.exp(-loss) for w, loss in zip(weights, column, strict=True)]
        mixed.append(-math.log(sum(joint)))
        posterior = [j / sum(joint) for j in joint]
        average = [a + (p - a) / look_back for a, p in zip(average, posterior, strict=True)]
        weights = [(1 - share) * p + share * a for a, p in zip(average, posterior, strict=True)]
    return torch.tensor(mixed, dtype=torch.float64), torch.tensor(before, dtype=torch.float64).T


def random_losses(number, length, spread=2.0, seed=0):
    """Losses that come and go: now one expert is the better, now another."""
    generator = torch.Generator().manual_seed(seed)
    trend = torch.randn(number, length // 20 + 1, generator=generator).repeat_interleave(20, 1)[:, :length]
    return 3 + (spread * trend + torch.randn(number, length, generator=generator)).abs()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(T, "BLOCK", 64)


@pytest.mark.parametrize("number, length", [(1, 50), (2, 64), (3, 333), (8, 500), (5, 7)])
@pytest.mark.parametrize("share, look_back", [(0.1, 16), (0.3, 1), (0, 7), (1, 4), (0.02, 1000)])
def test_a_mixture_is_that_of_past_posteriors(small_blocks, number, length, share, look_back):
    losses = random_losses(number, length)
    mixed, weights = T.mix(losses, share, look_back)
    expected, before = mixed_target_by_target(losses, share, look_back, 64)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights, before, rtol=1e-7, atol=1e-12)
    assert weights.sum(0).sub(1).abs().max() < 1e-12


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_a_mixture_is_never_above_its_best_expert_by_more_than_its_bound(small_blocks, spread):
    """In each block the logarithm of the number of experts and, behind each target, of what stays with it."""
    for seed in range(5):
        losses = random_losses(6, 640, spread, seed)
        mixed, _ = T.mix(losses, 0.1, 16)
        bound = 10 * math.log(6) - 640 * math.log(1 - 0.1)
        assert mixed.sum() <= losses.double().sum(1).min() + bound
    alike, _ = T.mix(losses[:1].expand(6, -1), 0.1, 16)
    torch.testing.assert_close(alike, losses[0].double())


def test_a_mixture_of_experts_that_take_turns_is_better_than_any():
    losses = torch.full((3, 3000), 4.0)
    for k in range(3):
        losses[k, torch.arange(3000) // 100 % 3 == k] = 1.0
    mixed, weights = T.mix(losses, 0.2, 100)
    assert mixed.mean() < 1.3 < losses.mean(1).min() - 1.5
    assert weights[1, 150] > 0.7 and weights[1, 250] < 0.2


def test_a_mixture_knows_no_later_loss(small_blocks):
    losses = random_losses(4, 200)
    mixed, weights = T.mix(losses, 0.1, 16)
    for t in (1, 15, 63, 64, 65, 199):
        other = losses.clone()
        other[:, t:] = random_losses(4, 200, seed=1)[:, t:]
        again, others = T.mix(other, 0.1, 16)
        assert torch.equal(again[:t], mixed[:t]) and torch.equal(others[:, : t + 1], weights[:, : t + 1])


def test_an_expert_that_has_no_finite_loss_counts_for_nothing():
    losses = random_losses(3, 100)
    losses[1, 30:] = math.nan
    losses[2, 50:] = math.inf
    mixed, weights = T.mix(losses, 0.1, 16)
    assert mixed.isfinite().all() and weights.isfinite().all()
    assert mixed[60:].sum() < losses[0, 60:].sum() + 40 * 0.2


def distribution(tokens, base, order, strength, t):
    """As it is told, by counting: p (V,) of the token behind position t; base (V,) is the model's."""
    begin = max([i for i in range(t + 1) if tokens[i] == T.BOS], default=0)
    p, padded = list(base), [0] * order + tokens
    for first, least in ((0, 2), (begin, 1)):
        for k in range(least, order + 1):
            last = [padded[order + i + 1 - k : order + i + 1] for i in range(t + 1)]
            behind = [tokens[i + 1] for i in range(first, t) if last[i] == last[t]]
            back = strength * len(set(behind))
            if behind:
                p = [(behind.count(y) + back * q) / (len(behind) + back) for y, q in enumerate(p)]
    return p


TEXT = [1, 3, 4, 3, 4, 5, 3, 4, 3, 4, 1, 3, 4, 5, 3, 4, 1, 1, 2, 3, 4, 3, 4, 5, 0, 0, 5, 3, 4, 5]


@pytest.mark.parametrize("tokens", [TEXT, TEXT[1:]], ids=["BOS first", "no BOS first"])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_n_grams_are_distributions_by_what_stands_before(tokens, order):
    """In the text, then in the document, over a model's."""
    base = torch.rand(len(tokens) - 1, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=1).double()
    losses = -base[torch.arange(len(base)), tokens[1:]].log()
    found = T.cache_losses(torch.tensor(tokens).int(), losses, order)
    assert found.shape == (len(T.STRENGTHS), len(losses))
    for a, row in zip(T.STRENGTHS, found.tolist(), strict=True):
        for t, loss in enumerate(row):
            p = distribution(tokens, base[t].tolist(), order, a, t)
            assert sum(p) == pytest.approx(1) and p[tokens[t + 1]] == pytest.approx(math.exp(-loss))
    assert torch.equal(found[:, 0], losses[:1].expand(3)) and (found != losses).any()


def test_n_grams_know_no_later_token():
    """Bitwise."""
    tokens, losses = torch.as_tensor(made_up_tokens(301)) % 20, random_losses(1, 300)[0]
    found = T.cache_losses(tokens, losses, 4)
    for t in (1, 2, 100, 299, 300):
        others, later = changed(tokens, t), losses.clone()
        later[t - 1 :] += 1
        again = T.cache_losses(others, later, 4)
        assert torch.equal(again[:, : t - 1], found[:, : t - 1]) and not torch.equal(again, found)


@pytest.mark.parametrize("experts, most", [(1, 0.006), (8, 0.002)])
def test_n_grams_that_know_nothing_cost_little(experts, most):
    """Of a text drawn by the model's own probabilities, more or less sure."""
    generator, n, size = torch.Generator().manual_seed(0), 50_000, 1024
    sure = torch.rand(n, generator=generator) ** 0.3
    tokens, right = (
        torch.randint(size, (n + 1,), generator=generator).int(),
        torch.rand(n, generator=generator) < sure,
    )
    losses = -torch.where(right, sure, (1 - sure) / (size - 1)).log()
    members = torch.cat((losses.expand(experts, -1), T.cache_losses(tokens, losses, 6)))
    mixed, _ = T.mix(members, 0.2, 100)
    assert 0 < mixed.mean() - losses.double().mean() < most


def test_n_grams_join_the_mixture_of_experts():
    """Built on what it was without them."""
    tokens = made_up_tokens(151) % 20
    mixed, losses, score = mixture_of(tokens, TTT_EXPERTS=EXPERTS, TTT_CACHE=3)
    plain, experts, _ = mixture_of(tokens, TTT_EXPERTS=EXPERTS)
    assert torch.equal(losses[:4], experts.double())
    assert torch.equal(losses[4:], T.cache_losses(torch.as_tensor(tokens), plain, 3))
    assert torch.equal(mixed, T.mix(losses, 0.2, 100)[0])
    assert score.nats == pytest.approx(mixed.sum().item()) and score.nats < plain.sum().item() - 10


@pytest.mark.parametrize("n", [10, 24, 40, 151])
def test_an_ensemble_of_one_is_the_plain_run(n):
    tokens = made_up_tokens(n + 1)
    nll, score = alone(tokens, TTT_LR=0.05)
    mixed, _, whole = mixture_of(tokens, TTT_EXPERTS="lr=0.05")
    torch.testing.assert_close(mixed, nll, rtol=1e-12, atol=0)
    assert whole == pytest.approx(score, rel=1e-13)


@pytest.mark.parametrize("n", [10, 24, 40, 151])
def test_each_expert_reads_as_if_it_were_alone(n):
    """With a rate, a chunk, a window of its own, whatever others do."""
    tokens, own = made_up_tokens(n + 1), EXPERTS.split(";")
    mixed, losses, score = mixture_of(tokens, TTT_EXPERTS=EXPERTS)
    assert losses.shape == (len(own), n) and score.tokens == n
    for k, text in enumerate(own):
        s = T.expert_settings(settings(**STREAMING, TTT_EXPERTS=text))[text]
        values = dict(TTT_LR=s.ttt_lr, TTT_CHUNK_TOKENS=s.ttt_chunk_tokens, TTT_EPOCHS=s.ttt_epochs)
        values |= dict(TTT_DECAY=s.ttt_decay)
        nll, _ = alone(tokens, **values)
        assert torch.equal(losses[k], nll)
    expected, _ = mixed_target_by_target(losses, 0.2, 100, T.BLOCK)
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)


def test_an_expert_that_forgets_learns_a_document_from_the_artifacts_weights():
    """Behind the chunk in which it begins, and from that chunk."""
    tokens = with_documents(made_up_tokens(151), every=50)  # BOS at 0, 50, 100, 150

    class Watch(T.Hooks):
        forgot, chunks = 0, []

        def on_forget(self, learner):
            self.forgot += 1
            assert all(map(torch.equal, learner.weights, learner.first))

        def on_chunk(self, ttt):
            self.chunks.append(T.copies(ttt.learner.weights))

    watch = Watch()
    evaluation_of(tokens, watch, TTT_EXPERTS="lr=0.05,forget=1").ttt.run()
    assert watch.forgot == 2  # chunk 0 and the last are not learnt from

    # chunk 2, positions 40 to 55, is learnt from as if nothing had been learnt before
    s = settings(**STREAMING | dict(TTT_LR=0.05, TTT_DECAY=0))
    model = random_model(s)
    scorer = T.Scorer(model, tokens.int(), byte_tables(), s.eval_seq_len, 64)
    mode = T.StreamingMode(s, scorer, T.Learner(model, s))
    for chunk in range(3):
        mode.score_chunk(chunk)
    mode.learn_chunk(2, 1)
    for found, weight in zip(watch.chunks[2], mode.learner.weights, strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4)


def test_forgetting_knows_no_later_beginning():
    tokens = with_documents(made_up_tokens(151), every=50)
    one, *_ = mixture_of(tokens, TTT_EXPERTS="lr=0.05,forget=1")
    kept, *_ = mixture_of(tokens, TTT_EXPERTS="lr=0.05")
    assert torch.equal(one[:56], kept[:56]) and not torch.equal(one[56:72], kept[56:72])
    for i in (30, 60, 90, 120):
        other = tokens.clone()
        other[i] = T.BOS
        again, *_ = mixture_of(other, TTT_EXPERTS="lr=0.05,forget=1")
        assert torch.equal(again[: i - 1], one[: i - 1]) and not torch.equal(again, one)


@pytest.mark.slow
def test_no_mixed_score_knows_a_later_token():
    tokens = torch.as_tensor(made_up_tokens(151))
    one, *_ = mixture_of(tokens, TTT_EXPERTS=EXPERTS)
    for i in (1, 23, 24, 40, 100, 150):
        other, *_ = mixture_of(changed(tokens, i), TTT_EXPERTS=EXPERTS)
        assert torch.equal(one[: i - 1], other[: i - 1]), i
        assert (one[i - 1 :] != other[i - 1 :]).any(), i


@pytest.mark.parametrize("whole", [1, 3, 5])
def test_an_ensemble_goes_on_from_its_state(whole):
    """In an expert, and between two."""
    tokens = made_up_tokens(151)
    expected, _, score = mixture_of(tokens, TTT_EXPERTS=EXPERTS)

    class Stop(Mixed):
        meetings, state = 0, None

        def on_meeting(self, ttt):
            self.meetings += 1
            if self.meetings == 4 * whole:
                self.state = round_trip(self.ensemble.state_dict())

        def should_stop(self, *, in_loop=False):
            return in_loop and self.state is not None

    stop, rest = Stop(), Mixed()
    stop.ensemble = evaluation_of(tokens, stop, TTT_EXPERTS=EXPERTS).ttt
    with pytest.raises(T.Stopped):
        stop.ensemble.run()
    assert stop.state["begun"] and len(stop.state["done"]) == len(stop.experts)
    again = evaluation_of(tokens, rest, TTT_EXPERTS=EXPERTS).ttt
    again.load_state_dict(stop.state)
    assert again.run() == score
    assert torch.equal(rest.nll, expected)
    assert len(rest.experts) == 4 - len(stop.experts)


@pytest.mark.slow
def test_experts_score_alike_on_any_number_of_processes(tmp_path):
    """Five experts, on as many as eight processes, of which some then do the same."""
    tiny.make_data(tmp_path)
    settings = dict(
        EVAL_MODE="streaming",
        TTT_EPOCHS=1,
        TTT_CHUNK_TOKENS=256,
        TTT_EXPERTS="lr=0;lr=0.01,chunk=64;lr=0.02;lr=0.02,epochs=2;lr=0.05,muon=0",
        TTT_CACHE=2,
    )
    assert tiny.run(tmp_path, TTT_ENABLED=0).status == 0
    only = settings | dict(TTT_ENABLED=1, EVAL_ONLY=1, ARTIFACT_PATH="logs/tiny.bin", AUDIT=1)
    found = {}
    for world in (1, 2, 4, 8):
        result, *others = tiny.run_ranks(tmp_path, world, **only)
        assert (result.status, result.err) == (0, "") and not any(other.status for other in others)
        found[world] = [float(number) for number in re.findall(r"(?:bpb|val_bpb|weight):(\S+)", result.out)]
        assert result.out.count("\nexpert ") == 8 and "violations:0" in result.out
    for world, numbers in found.items():
        assert numbers == pytest.approx(found[1], abs=1e-4), world


class Told(T.Clock):
    """Goes on only when told to."""

    now = 0.0

    def seconds(self):
        return self.now


def slowed(clock):
    """A mode whose chunks take a second to score and two to learn from."""

    class Slow(T.StreamingMode):
        def score_chunk(self, chunk):
            clock.now += 1
            return super().score_chunk(chunk)

        def learn_chunk(self, chunk, epochs):
            clock.now += 2 * epochs
            super().learn_chunk(chunk, epochs)

    return Slow


@pytest.mark.parametrize("limit, read", [(1000, 4), (100, 4), (45, 3), (30, 2), (5, 1)])
def test_experts_share_the_time_and_those_that_have_none_are_dropped(limit, read):
    """Twelve chunks: four experts that only score take 48 seconds."""
    mixed, dropped = Mixed(), []
    evaluation = evaluation_of(
        made_up_tokens(24 + 11 * 16 + 1),
        mixed,
        TTT_EXPERTS="lr=0.01;lr=0.02;lr=0.03;lr=0.04",
        EVAL_MAX_SECONDS=limit,
    )
    ensemble = evaluation.ttt
    ensemble.clock = Told()
    ensemble.mode, ensemble.log = slowed(ensemble.clock), T.Log()
    ensemble.log.outputs.clear()
    ensemble.log.event = lambda name, **values: dropped.append(values["experts"])
    score = ensemble.run()
    assert score.tokens == 24 + 11 * 16 and len(mixed.losses) == read
    assert dropped == (["; ".join(["lr=0.02", "lr=0.03", "lr=0.04"][read - 1 :])] if read < 4 else [])
    assert ensemble.clock.now <= max(limit, 12)
    if limit == 1000:
        assert ensemble.clock.now == 4 * (12 + 2 * 10)


@pytest.mark.parametrize(
    "text, said",
    [
        ("lr=0;rate=1", "TTT_EXPERTS: 'rate' is none of lr, decay, epochs, muon, forget, chunk"),
        ("lr=0,", "TTT_EXPERTS: '' is none of"),
        ("lr=0;lr", "TTT_LR='': allowed is a number from 0"),
        ("lr=0;lr=-1", "TTT_LR='-1': allowed is a number from 0"),
        ("lr=0;lr=0.1,muon=some", "TTT_MUON='some': allowed is 0 or 1"),
        ("lr=0;lr=0.1;lr=0.1", "TTT_EXPERTS: lr=0.1: stands twice"),
        ("lr=0;lr=0.1,chunk=5", "TTT_EXPERTS: lr=0.1,chunk=5: chunk must divide TTT_CHUNK_TOKENS=16"),
    ],
)
def test_bad_experts_are_named_in_one_line(text, said):
    with pytest.raises(T.RunError, match=re.escape(said)):
        settings(**STREAMING, TTT_EXPERTS=text)


def test_a_share_that_is_none_is_an_error():
    with pytest.raises(T.RunError, match="TTT_SHARE='1.1': allowed is a number from 0 to 1"):
        settings(**STREAMING, TTT_SHARE=1.1)


def test_the_frontiers_experts_go_with_any_chunk_and_stay_away_where_nothing_streams():
    frontier = T.parse_settings({"RECIPE": "frontier", "TTT_CHUNK_TOKENS": "100", "TTT_EPOCHS": "2"})
    assert len(T.expert_settings(frontier)) == 8 and frontier.ttt_cache == 6
    needs = "TTT_CACHE needs TTT_EXPERTS, that EVAL_MODE=streaming and TTT_ENABLED=1"
    for setting in ({"EVAL_MODE": "sliding", "TTT_CHUNK_TOKENS": "32768"}, {"TTT_ENABLED": "0"}):
        s = T.parse_settings({"RECIPE": "frontier", "TTT_CACHE": "0"} | setting)
        assert s.ttt_experts == "" and s.ttt_cache == 0
        for given in ({"TTT_EXPERTS": "lr=0"}, {"TTT_CACHE": "4"}):
            with pytest.raises(T.RunError, match=needs):
                T.parse_settings({"RECIPE": "frontier"} | given | setting)
    assert T.parse_settings({"RECIPE": "frontier", "TTT_EXPERTS": ""}).ttt_cache == 0
    with pytest.raises(T.RunError, match=needs):
        T.parse_settings({"EVAL_MODE": "streaming", "TTT_CACHE": "4"})


def test_an_artifact_of_a_stream_brings_its_mode_along_when_only_experts_are_given():
    kept = vars(T.parse_settings({"EVAL_MODE": "streaming", "TTT_ENABLED": "1"}))
    given = {"EVAL_ONLY": "1", "ARTIFACT_PATH": "logs/a.bin", "TTT_EXPERTS": "lr=0;lr=0.02"}
    T.parse_settings(given)  # before the artifact is read
    assert len(T.expert_settings(T.parse_settings(given, kept))) == 2
