"""Training: warm-up, clock, schedules, average, optimizers, switches and initial weights."""

import math
from types import SimpleNamespace

import pytest
import torch

import train_gpt as T
from tests.helpers import (
    FRONTIER,
    Trainer,
    muon_update,
    random_batch,
    random_model,
    round_trip,
    settings,
    snapshot,
    trainer_of,
    write_shards,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def validate():
    return T.Score()


def same(weights, others):
    return all(torch.equal(w, v) for w, v in zip(weights, others, strict=True))


# Warm-up and clock


def test_warm_up_leaves_no_trace(folder):
    runs = [trainer_of(folder, WARMUP_STEPS=n, ITERATIONS=6) for n in (0, 3)]
    for trainer in runs:
        trainer.run(validate)
    assert [len(trainer.measured) for trainer in runs] == [6, 9]
    assert torch.equal(torch.stack(runs[0].measured), torch.stack(runs[1].measured[3:]))
    assert same(runs[0].weights, runs[1].weights)


def test_the_seed_decides(folder):
    weights = [trainer_of(folder, SEED=seed).weights for seed in (1, 1, 2)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


class SlowTrainer(Trainer):
    """Takes so many seconds, by a clock that moves only when told to."""

    now = 0.0
    seconds = dict(step=0.0, calibration=0.0)

    def train_step(self, *args):
        self.now += self.seconds["step"]
        return super().train_step(*args)

    def calibrate(self, part=None):
        self.now += self.seconds["calibration"]
        return super().calibrate(part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cap, step, calibration, steps",
    [(10, 0.5, 0, 20), (10, 0.5, 0.5, 18), (10, 0.75, 0.25, 12), (0.5, 1, 0, 1)],
)  # s
def test_training_and_calibration_fit_under_the_cap(folder, monkeypatch, cap, step, calibration, steps):
    trainer = trainer_of(
        folder,
        SlowTrainer,
        MAX_WALLCLOCK_SECONDS=cap,
        ITERATIONS=100,
        WARMUP_STEPS=2,
        VAL_LOSS_EVERY=3,
        NUM_LAYERS=1,
        VE_LAYERS="0",
    )
    trainer.seconds, starts = dict(step=step, calibration=calibration), []
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: trainer.now))

    def slow_validation():
        trainer.now += 1000
        starts.append(trainer.now)
        return T.Score()

    trainer.run(slow_validation)
    assert len(trainer.measured) == 2 + steps
    assert len(starts) == len({*range(0, steps, 3), steps})  # validated so often, and it did not count:
    training = trainer.now - 2 * calibration - 2 * step - 1000 * len(starts)  # no warm-up, no validation
    assert training == steps * step + calibration
    if steps > 1:
        assert training <= cap < training + step + calibration  # (a part of what is kept free is a reserve)


def test_a_loss_that_is_not_finite_ends_training(folder):
    trainer = trainer_of(folder)
    trainer.model.register_forward_hook(lambda model, args, nll: nll / (len(trainer.measured) < 2))
    with pytest.raises(T.RunError, match="^step 3: loss inf, gradient norm nan; lower the learning rates$"):
        trainer.run(validate)


def test_iterations_end_a_run_without_a_cap(folder):
    trainer = trainer_of(folder, ITERATIONS=3)
    trainer.run(validate)
    assert len(trainer.measured) == 3


# Schedules


def multiplier(s, step, elapsed=0, budget=math.inf):
    return max(T.warmdown_left(step, s, elapsed, budget), s.min_lr)


def test_learning_rate_multiplier_by_time():
    s = settings(WARMDOWN_ITERS=10)
    at = [multiplier(s, step, 100 * step, 5000) for step in (0, 1, 39, 40, 41, 45, 50, 51)]  # 100 ms a step
    assert at == pytest.approx([1, 1, 1, 1, 0.9, 0.5, 0, 0])
    assert multiplier(s, 20, 4000, 5000) == pytest.approx(0.5)  # slower steps: 200 ms


def test_learning_rate_multiplier_by_iterations():
    s = settings(WARMDOWN_ITERS=10, ITERATIONS=50)
    at = [multiplier(s, step) for step in (0, 39, 40, 41, 45, 49)]
    assert at == pytest.approx([1, 1, 1, 0.9, 0.5, 0.1])
    assert multiplier(settings(WARMDOWN_ITERS=0), 3) == 1


def test_the_warm_down_may_be_a_share_of_training_and_end_above_zero():
    """Of the steps or of the seconds, whichever are used up sooner."""
    s = settings(WARMDOWN_FRACTION=0.8, MIN_LR=0.1, ITERATIONS=100, WARMDOWN_ITERS=3)
    by_iterations = [multiplier(s, step) for step in (0, 20, 40, 60, 90, 96, 100)]
    by_time = [multiplier(s, 1, elapsed, 50) for elapsed in (0, 10, 20, 30, 45, 48, 60)]
    assert by_iterations == pytest.approx([1, 1, 0.75, 0.5, 0.125, 0.1, 0.1])
    assert by_time == pytest.approx(by_iterations)
    assert multiplier(s, 60, 10, 50) == multiplier(s, 20, 30, 50) == pytest.approx(0.5)
    assert multiplier(settings(WARMDOWN_FRACTION=1, ITERATIONS=100), 25) == 0.75


def test_the_least_learning_rate_holds_for_a_warm_down_of_iterations_too():
    s = settings(WARMDOWN_ITERS=10, ITERATIONS=50, MIN_LR=0.3)
    assert [multiplier(s, step) for step in (40, 45, 48, 50)] == pytest.approx([1, 0.5, 0.3, 0.3])


def test_the_share_of_training_is_that_of_steps_or_of_seconds():
    s = settings(ITERATIONS=8)
    at = [T.share_done(2, s, elapsed, 10) for elapsed in (0, 2, 5, 10, 11)]
    assert at == [0.25, 0.25, 0.5, 1, 1] and T.share_done(2, s, 99, math.inf) == 0.25


class Planned(Trainer):
    """Notes what is planned for each step; each takes a second, by a clock that moves only then."""

    now = 0.0

    def train_step(self, *args):
        self.steps_as.append((self.model.looping, self.piece))
        self.now += 1
        return super().train_step(*args)


@pytest.mark.parametrize("limit", [dict(ITERATIONS=8), dict(MAX_WALLCLOCK_SECONDS=8, ITERATIONS=99)], ids=str)
def test_loops_and_longer_pieces_begin_at_their_share_of_steps_or_of_time(folder, monkeypatch, limit):
    """And both orders of layers are compiled in warm-up."""
    extra = FRONTIER | dict(LOOP_FROM=0.3, TRAIN_SEQ_SCHEDULE="8@0,16@0.25,24@0.6", WARMUP_STEPS=2)
    trainer = trainer_of(folder, Planned, **extra | limit)
    trainer.steps_as = []
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: trainer.now))
    trainer.run(validate)
    loops, pieces = zip(*trainer.steps_as, strict=True)
    assert loops == (True, False) + (False,) * 3 + (True,) * 5
    assert pieces == (24, 8) + (8, 8, 16, 16, 16, 24, 24, 24)
    assert trainer.model.looping and trainer.piece == 24  # in the choice and the calibration


def test_without_a_schedule_pieces_are_as_long_as_a_training_sequence(folder):
    trainer = trainer_of(folder, DOCUMENT_ATTENTION=1)
    for share in (0, 0.5, 1):
        trainer.enter(share)
        assert trainer.piece == 16


def test_muon_momentum_rises_linearly():
    s = settings(MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM=0.98, MUON_MOMENTUM_WARMUP_STEPS=100)
    assert [T.muon_momentum(step, s) for step in (0, 25, 50, 100, 999)] == pytest.approx(
        [0.9, 0.92, 0.94, 0.98, 0.98]
    )


# Average


def test_the_decay_of_the_average_rises_to_its_setting():
    s = settings(EMA_DECAY=0.7)
    at = [T.ema_decay(step, s) for step in (0, 1, 8, 20, 21, 999)]
    assert at == pytest.approx([1 / 25, 2 / 26, 9 / 33, 21 / 45, 22 / 46, 0.7])


class Snapshots(T.Hooks):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step(self, trainer, last):
        self.weights += [snapshot(trainer.weights)] if trainer.done else []


def test_the_average_is_that_of_a_plain_loop(folder):
    trainer = trainer_of(folder, hooks=Snapshots(), EMA_DECAY=0.3)
    ema = snapshot(trainer.weights)
    trainer.run(validate)
    for step, weights in enumerate(trainer.run_of.hooks.weights):
        decay = min(0.3, (1 + step) / (25 + step))
        ema = [decay * e + (1 - decay) * w for e, w in zip(ema, weights, strict=True)]
    assert len(trainer.run_of.hooks.weights) == 8
    for found, expected in zip(trainer.weights, ema, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_an_average_the_last_steps_weights_are_the_result(folder):
    trainer = trainer_of(folder, hooks=Snapshots(), EMA_DECAY=0)
    trainer.run(validate)
    assert same(trainer.weights, trainer.run_of.hooks.weights[-1])


class Events(T.Hooks):
    """Keeps what is logged."""

    def __init__(self):
        self.events = []

    def on_event(self, name, values):
        self.events.append((name, values))

    def of(self, name, key):
        return [values[key] for event, values in self.events if event == name]


def test_the_quantizer_is_calibrated_by_the_first_whole_sequences(folder):
    trainer = trainer_of(folder, CALIBRATION_TOKENS=200)
    tokens = T.read_stream(T.open_shards(folder, "train"), 0, 200 // 16 * 16 + 1).tolist()
    assert trainer.calibration_tokens.tolist() == tokens and sum(map(len, trainer.shards)) == 7000
    assert len(trainer_of(folder, CALIBRATION_TOKENS=1).calibration_tokens) == 17


# State


class Kept(T.Hooks):
    """Keeps the state before a step, as a checkpoint does; gives back one that it is made with."""

    def __init__(self, step=None, state=None):
        self.step, self.state = step, state

    def on_step(self, trainer, last):
        if trainer.done == self.step:
            self.state = round_trip(trainer.state_dict())

    def restore_training(self):
        return self.state if self.step is None else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, extra", [(0, {}), (3, {}), (8, {}), (5, FRONTIER)], ids=["0", "3", "8", "frontier"]
)
def test_training_goes_on_from_its_state_as_if_it_had_not_ended(folder, step, extra):
    """Weights, momenta and average are carried over; a trainer of another seed holds none of them before."""
    kept = Kept(step)
    whole = trainer_of(folder, hooks=kept, **extra)
    calibrations = [whole.run(validate)]
    again = trainer_of(folder, hooks=Kept(state=kept.state), SEED=7, **extra)
    calibrations.append(again.run(validate))
    assert (again.done, len(again.measured)) == (8, 8 - step)
    assert same(again.measured, whole.measured[step:]) and same(again.weights, whole.weights)
    assert same(again.ema, whole.ema)
    for parts in (lambda c: c.moments, lambda c: c.fisher):
        one, other = map(parts, calibrations)
        assert same(other.values(), one.values())
    assert kept.state["done"] == step and again.elapsed > kept.state["elapsed"] * (step < 8)


def test_the_time_that_is_kept_is_that_of_the_calibration(folder, monkeypatch):
    """One and a half; as measured on a part of the text if it is long, for a CPU."""
    trainer, now, read = trainer_of(folder, WARMUP_STEPS=0, CALIBRATION_TOKENS=640), [0.0], []

    def calibrate(part):
        read.append(part - 1)
        now[0] += 100 * (part - 1)

    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer.calibrate = calibrate
    assert trainer.warm_up() == 640 * 150 and set(read) == {640}
    monkeypatch.setattr(T, "WARM_UP_TOKENS", 50)
    read.clear()
    assert trainer.warm_up() == pytest.approx(640 * 150) and set(read) == {48}


def test_a_part_of_the_tokens_to_calibrate_by_is_its_beginning(folder):
    trainer, first = (trainer_of(folder, CALIBRATION_TOKENS=640) for _ in range(2))
    first.calibration_tokens = first.calibration_tokens[:97]
    found, whole = trainer.calibrate(97), first.calibrate()
    assert all(torch.equal(found.moments[name], m) for name, m in whole.moments.items())


def test_a_steps_gradients_are_those_of_all_spans_at_once(folder):
    """The cast matrices are leaves: gradients are added up there and go through the cast once."""
    trainer = trainer_of(folder, TRAIN_BATCH_TOKENS=512)
    with trainer.loader() as spans:
        spans = next(spans)
    found, whole = {}, trainer.model
    trainer.optimizers.step = lambda *_: (
        found.update({name: p.grad.clone() for name, p in whole.named_parameters()}) or torch.tensor(0.0)
    )
    trainer.train_step(spans, 1.0, 0.9)
    whole.zero_grad()
    x, y = spans[:, :-1].reshape(-1, 16).long(), spans[:, 1:].reshape(-1, 16).long()
    (whole(x, y, whole.matrices()).sum() / 512).backward()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


class Child(T.Stateful):
    STATE = ("number",)

    def __init__(self, number):
        self.number = number


class Parent(T.Stateful):
    STATE = ("weights", "child", "plain", "nothing", "tensors", "optimizer", "texts")

    def __init__(self, value, plain):
        self.weights = [torch.nn.Parameter(torch.full((3,), value))]
        self.child = Child(value)
        self.plain, self.nothing, self.tensors, self.texts = (
            plain,
            None,
            {"t": torch.full((2,), value)},
            ["x", value],
        )
        self.optimizer = torch.optim.SGD(self.weights, 0.1, momentum=0.5)
        self.weights[0].grad = torch.full((3,), value)
        self.optimizer.step()


def test_a_state_gives_back_every_kind_of_thing_and_leaves_weights_in_their_place():
    old, new = Parent(1.0, dict(x=1)), Parent(5.0, dict(y=2))
    place, child, optimizer = new.weights[0], new.child, new.optimizer
    new.load_state_dict(round_trip(old.state_dict()))
    assert new.weights[0] is place and new.child is child and new.optimizer is optimizer
    assert torch.equal(place, old.weights[0]) and place.requires_grad
    assert new.child.number == 1
    assert (new.plain, new.nothing, new.texts) == (dict(x=1), None, ["x", 1.0])
    assert torch.equal(new.tensors["t"], old.tensors["t"])
    assert torch.equal(optimizer.state[place]["momentum_buffer"], torch.ones(3))


def test_a_clock_goes_on_and_leaves_out_what_is_subtracted(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = T.Clock()
    now[0] += 6
    assert clock.seconds() == 6
    clock.add(-2)
    assert clock.seconds() == 4
    again = T.Clock()
    again.load_state_dict(clock.state_dict())
    now[0] += 1
    assert again.seconds() == clock.seconds() == 5


# Optimizers


def backward(model, *args):
    model.zero_grad()
    loss = model(*args).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_muon_does_not_depend_on_the_scale_of_the_gradient():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4, 16, 24, generator=generator)
    updates = []
    for scale in (1, 1 / 1024, 4096):
        buffer = torch.zeros(4, 16, 24, dtype=torch.bfloat16)
        updates.append([muon_update(scale * grad, buffer, 0.95, 5) for grad in grads])
    for other in updates[1:]:
        for a, b in zip(updates[0], other, strict=True):
            assert (a - b).float().norm() < 1e-2 * a.float().norm()
    values = torch.linalg.svdvals(updates[0][-1].float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_polar_coefficients_bring_singular_values_nearer_to_one():
    """Even of a badly conditioned matrix, in as many steps."""
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(16, 24, generator=generator), full_matrices=False)
    matrix = U @ torch.diag(torch.logspace(-2, 0, 16)) @ V
    classic, polar = (
        (torch.linalg.svdvals(T.newton_schulz(matrix, 5, triples).float()) - 1).abs().max()
        for triples in (T.CLASSIC, T.POLAR)
    )
    assert polar < 0.15 < 0.3 < classic


def test_row_norm_gives_each_row_of_an_update_the_same_length():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2, 8, 32, generator=generator) * torch.logspace(-3, 3, 8)[:, None]
    grad[0, 3] = 0
    buffer = torch.zeros(2, 8, 32, dtype=torch.bfloat16)
    lengths = T.nesterov_update(grad, buffer, 0.9, row_norm=True).float().norm(dim=-1)
    expected = torch.ones(2, 8)
    expected[0, 3] = 0
    torch.testing.assert_close(lengths, expected, rtol=0, atol=0.01)
    assert torch.equal(buffer, grad.bfloat16())  # the momentum is of the gradients as they are


PARTS = dict(
    SMEAR="token", SKIP_GATES=1, ATTN_GATE_CHANNELS=4, PARALLEL_FROM=2, LOOP_LAYERS="1", LOOP_COUNT=1
)


@pytest.mark.parametrize("extra", [dict(), dict(BIGRAM_VOCAB_SIZE=0, VE_LAYERS=""), PARTS], ids=str)
def test_every_parameter_has_one_optimizer_and_its_own_learning_rate(extra):
    s = settings(**extra, TIED_EMBED_LR=0.01, SCALAR_LR=0.04)
    model = random_model(s)
    optimizers, names = T.Optimizers(model, s), {id(p): name for name, p in model.named_parameters()}
    backward(model, *random_batch())
    optimizers.step(0.5, 0.95)
    rates = [
        (names[id(p)], 2 * group["lr"]) for group in optimizers.adamw.param_groups for p in group["params"]
    ]
    assert sorted([name for name, _ in rates] + list(model.BANKS)) == sorted(
        names.values()
    )  # each exactly once
    assert [names[id(p)] for p in optimizers.weights[4:]] == [name for name, _ in rates]
    assert {names[id(p)] for p in optimizers.weights[:4]} == set(model.BANKS)
    special = dict(tok_emb=0.01, bigram_table=0.01, ve_table=0.01)
    for name, rate in rates:
        assert rate == special.get(name, 0.04), name


@pytest.mark.parametrize(
    "extra, rule",
    [
        ({}, {}),
        (dict(MUON_ROW_NORM=1), dict(row_norm=True)),
        (dict(NS_COEFFICIENTS="polar", MUON_BACKEND_STEPS=4), dict(triples=T.POLAR, steps=4)),
    ],
    ids=["record", "row norm", "polar"],
)
def test_banks_move_by_muon_at_the_matrix_learning_rate(extra, rule):
    s = settings(MATRIX_LR=0.05, MUON_WD=0.1, GRAD_CLIP_NORM=0, **extra)
    model = random_model(s)
    banks, (_, grads) = [bank.detach().clone() for bank in model.banks()], backward(model, *random_batch())
    grads = dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))
    T.Optimizers(model, s).step(0.5, 0.9)
    for name, bank, before in zip(model.BANKS, model.banks(), banks, strict=True):
        update = muon_update(grads[name], torch.zeros_like(before, dtype=torch.bfloat16), 0.9, **rule)
        T.apply_muon_update(before, update, lr=0.025, weight_decay=0.1)
        torch.testing.assert_close(bank.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0, 0.1, 1000])
def test_all_gradients_are_clipped_to_one_global_norm(clip):
    s = settings(GRAD_CLIP_NORM=clip, ADAM_WD=0, MUON_WD=0)
    model = random_model(s)
    optimizers = T.Optimizers(model, s)
    _, grads = backward(model, *random_batch())
    total = torch.stack([grad.norm() for grad in grads]).norm()
    assert optimizers.step(1.0, 0.95).item() == pytest.approx(total.item(), rel=1e-5)
    factor = min(1, clip / total) if clip else 1
    momentum = dict(
        zip(optimizers.banks, optimizers.momentum, strict=True)
    )  # after one step: the gradient, for AdamW a tenth of it
    for p, grad in zip(model.parameters(), grads, strict=True):
        kept = momentum[p].float() if p in momentum else 10 * optimizers.adamw.state[p]["exp_avg"]
        torch.testing.assert_close(kept, factor * grad, rtol=1e-2, atol=1e-8)
        assert p.grad is None


def test_weight_decay():
    p = torch.randn(2, 8, 4)
    before = p.clone()
    T.apply_muon_update(p, torch.ones(2, 8, 4, dtype=torch.bfloat16), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(p, before * 0.95 - 0.1 * 2**0.5)  # tall: times sqrt(rows / columns)


@pytest.mark.parametrize("embed_wd, of_tables", [(0.25, 0.25), (0, 0), (-1, 0.5)])
def test_the_tables_weight_decay_is_theirs_alone(embed_wd, of_tables):
    s = settings(
        EMBED_WD=embed_wd, ADAM_WD=0.5, MUON_WD=0.75, TIED_EMBED_LR=0.1, SCALAR_LR=0.2, MATRIX_LR=0.4
    )
    model = random_model(s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay alone moves it
    T.Optimizers(model, s).step(0.5, 0.9)
    for name, p in model.named_parameters():
        lr, decay = (0.4, 0.75) if name in model.BANKS else (0.2, 0.5)
        if name in ("tok_emb", "bigram_table", "ve_table"):
            lr, decay = 0.1, of_tables
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * lr * decay), msg=name)


# Switches and initial weights


@pytest.mark.parametrize(
    "extra",
    [
        dict(),
        dict(BIGRAM_VOCAB_SIZE=0),
        dict(BIGRAM_DIM=32),
        dict(VE_LAYERS=""),
        dict(VE_DIM=16),
        dict(NUM_LAYERS=1, VE_LAYERS=0),
        dict(NUM_LAYERS=2, VE_LAYERS="0,1"),
        dict(XSA_LAST_N=0),
        dict(XSA_LAST_N=9),
        dict(NUM_KV_HEADS=4),
        dict(NUM_HEADS=1, NUM_KV_HEADS=1, ROPE_DIMS=32),
        dict(LOOP_LAYERS="0-1", LOOP_COUNT=2),
        dict(LOOP_LAYERS=1, LOOP_COUNT=1, PARALLEL_FROM=2),
        dict(PARALLEL_FROM=1),
        dict(SMEAR="token"),
        dict(SKIP_GATES=1),
        dict(SKIP_GATES=1, NUM_LAYERS=1, VE_LAYERS=0),
        dict(ATTN_GATE_CHANNELS=12),
        dict(DOCUMENT_ATTENTION=1),
        dict(MUON_ROW_NORM=1),
        dict(NS_COEFFICIENTS="polar"),
        FRONTIER,
    ],
    ids=str,
)
def test_every_switch_gives_a_model_that_learns(extra):
    s = settings(**extra)
    torch.manual_seed(0)
    model = T.GPT(s).initialize()
    optimizers, batch = T.Optimizers(model, s), random_batch()
    losses = []
    for _ in range(13):
        loss, _ = backward(model, *batch)
        losses.append(loss.item())
        optimizers.step(1.0, 0.9)
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert losses[-1] < losses[0] - 1


def gram(matrices):
    """Products of the rows, or of the columns where there are fewer of them: (n, rows, columns) -> (n, k,
    k)."""
    m = matrices if matrices.size(-2) <= matrices.size(-1) else matrices.mT
    return m @ m.mT


def test_initial_weights():
    s = settings(
        MODEL_DIM=64,
        NUM_LAYERS=5,
        VOCAB_SIZE=512,
        BIGRAM_DIM=96,
        VE_DIM=128,
        VE_LAYERS="2,4",
        NUM_KV_HEADS=4,
        QK_GAIN_INIT=1.7,
        TIED_EMBED_INIT_STD=0.02,
    )
    torch.manual_seed(0)
    model = T.GPT(s).initialize()
    expected = dict(
        bigram_table=0, bigram_scale=0.05, ve_scale=0.1, ve_layer_scales=1, smear_gate=0, skip_weights=1
    )
    for name, value in expected.items():
        assert (getattr(model, name) == value).all(), name
    for block in model.blocks:
        assert (block.attn_scale == 1).all() and (block.mlp_scale == 1).all() and (block.q_gain == 1.7).all()
        assert (block.resid_mix[0] == 1).all() and (block.resid_mix[1] == 0).all()
    for table, std in ((model.tok_emb, 0.02), (model.ve_table, 0.01)):
        assert table.mean().abs() < 0.02 * std and table.std().item() == pytest.approx(std, rel=0.02)
    orthogonal = [
        model.qo_bank[:5],
        model.kv_bank,
        model.up_bank,
        model.bigram_proj[None],
        model.ve_proj[None],
    ]
    for matrices in orthogonal:
        products = gram(matrices.detach())
        torch.testing.assert_close(products, torch.eye(64).expand_as(products), rtol=0, atol=1e-5)
    assert not model.qo_bank[5:].any() and not model.down_bank.any()  # layers begin by adding nothing


def test_projections_with_a_side_below_64_start_at_zero():
    torch.manual_seed(0)
    model = T.GPT(settings(MODEL_DIM=64, BIGRAM_DIM=63, VE_DIM=96)).initialize()  # values are 32 wide
    assert not model.bigram_proj.any() and not model.ve_proj.any()
    assert model.ve_table.any()
