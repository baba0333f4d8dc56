"""Training: warm-up, clock, schedules, averages, late QAT, optimizers, switches and initial weights."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train_gpt as T
from tests.helpers import (
    Trainer,
    random_batch,
    random_model,
    round_trip,
    settings,
    snapshot,
    start_qat,
    trainer_of,
    write_shards,
)

LIMIT = T.FIELDS["ARTIFACT_LIMIT"].default


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def validate():
    return T.Score()


def same(weights, others):
    return all(torch.equal(w, v) for w, v in zip(weights, others, strict=True))


# Warm-up and clock


def test_warm_up_leaves_no_trace(folder):
    runs = [trainer_of(folder, WARMUP_STEPS=n, ITERATIONS=6, LATE_QAT_THRESHOLD=0.9) for n in (0, 3)]
    for trainer in runs:
        trainer.run(validate, LIMIT)
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
    seconds = dict(step=0.0, holdout=0.0, calibration=0.0)

    def train_step(self, *args):
        self.now += self.seconds["step"]
        return super().train_step(*args)

    def holdout_loss(self, part=None):
        self.now += self.seconds["holdout"]
        return super().holdout_loss(part)

    def calibrate(self, part=None):
        self.now += self.seconds["calibration"]
        return super().calibrate(part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cap, step, holdout, calibration, steps",
    [
        (10, 0.5, 0, 0, 20),
        (10, 0.5, 0.25, 0, 18),
        (10, 0.5, 0.25, 0.5, 16),
        (10, 0.75, 0.125, 0.25, 12),
        (0.5, 1, 0, 0, 1),
    ],
)  # s
def test_training_average_and_calibration_fit_under_the_cap(
    folder, monkeypatch, cap, step, holdout, calibration, steps
):
    trainer = trainer_of(
        folder,
        SlowTrainer,
        MAX_WALLCLOCK_SECONDS=cap,
        ITERATIONS=100,
        WARMUP_STEPS=2,
        SWA_EVERY=1,
        VAL_LOSS_EVERY=3,
        LATE_QAT=0,
        NUM_LAYERS=1,
        VE_LAYERS="0",
    )
    trainer.seconds, starts = dict(step=step, holdout=holdout, calibration=calibration), []
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: trainer.now))

    def slow_validation():
        trainer.now += 1000
        starts.append(trainer.now)
        return T.Score()

    trainer.run(slow_validation, LIMIT)
    assert len(trainer.measured) == 2 + steps
    assert len(starts) == len({*range(0, steps, 3), steps})  # validated so often, and it did not count:
    training = (
        trainer.now - 2 * (step + holdout + calibration) - 1000 * len(starts)
    )  # all but warm-up and validation
    assert training == steps * step + 3 * holdout + calibration  # three averages were measured
    if steps > 1:
        assert (
            training <= cap < training + step + holdout + calibration
        )  # (a part of what is kept free is a reserve)


def test_a_loss_that_is_not_finite_ends_training(folder):
    trainer = trainer_of(folder)
    trainer.model.register_forward_hook(lambda model, args, nll: nll / (len(trainer.measured) < 2))
    with pytest.raises(T.RunError, match="^step 3: .*inf"):
        trainer.run(validate, LIMIT)


def test_iterations_end_a_run_without_a_cap(folder):
    trainer = trainer_of(folder, ITERATIONS=3)
    trainer.run(validate, LIMIT)
    assert len(trainer.measured) == 3


# Schedules


def test_learning_rate_multiplier_by_time():
    s = settings(WARMDOWN_ITERS=10)
    at = [
        T.lr_multiplier(T.warmdown_left(step, s, 100 * step, 5000)) for step in (0, 1, 39, 40, 41, 45, 50, 51)
    ]  # 100 ms a step
    assert at == pytest.approx([1, 1, 1, 1, 0.9, 0.5, 0, 0])
    assert T.lr_multiplier(T.warmdown_left(20, s, 4000, 5000)) == pytest.approx(0.5)  # slower steps: 200 ms


def test_learning_rate_multiplier_by_iterations():
    s = settings(WARMDOWN_ITERS=10, ITERATIONS=50)
    at = [T.lr_multiplier(T.warmdown_left(step, s, 0, math.inf)) for step in (0, 39, 40, 41, 45, 49)]
    assert at == pytest.approx([1, 1, 1, 0.9, 0.5, 0.1])
    assert T.lr_multiplier(T.warmdown_left(3, settings(WARMDOWN_ITERS=0), 0, math.inf)) == 1


def test_muon_momentum_rises_linearly():
    s = settings(MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM=0.98, MUON_MOMENTUM_WARMUP_STEPS=100)
    assert [T.muon_momentum(step, s) for step in (0, 25, 50, 100, 999)] == pytest.approx(
        [0.9, 0.92, 0.94, 0.98, 0.98]
    )


# Averages


def test_ema_and_swa_are_those_of_a_plain_loop():
    s = settings(EMA_DECAY=0.7, SWA_EVERY=3)
    weights = [torch.zeros(2, 3), torch.zeros(())]
    averages, ema, samples, begun = T.Averages(weights, s), 0.0, [], []
    for step in range(40):
        value = math.sin(step)
        for w in weights:
            w.fill_(value)
        left = 0.19 if step >= 20 else 0.2
        begun += [step] if averages.update(step, left) else []
        decay = min(0.7, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * value
        samples += [value] if step >= 20 and step % 3 == 0 else []
    swa = sum(samples) / len(samples)
    expected = dict(raw=math.sin(39), ema=ema, swa=swa)
    found = averages.candidates()
    assert list(found) == list(expected) and begun == [21]
    for name, value in expected.items():
        assert [w.shape for w in found[name]] == [w.shape for w in weights]
        assert all(w.double().numpy() == pytest.approx(value, abs=1e-6) for w in found[name])


class Choosing(Trainer):
    """Notes its last step's weights."""

    def choose(self):
        self.last, self.given = snapshot(self.weights), self.averages.candidates()["raw"]
        super().choose()


class Events(T.Hooks):
    """Keeps what is logged."""

    def __init__(self):
        self.events = []

    def on_event(self, name, values):
        self.events.append((name, values))

    def of(self, name, key):
        return [values[key] for event, values in self.events if event == name]


@pytest.mark.parametrize(
    "extra, names",
    [
        (dict(), ["raw", "ema", "swa"]),
        (dict(EMA_ENABLED=0), ["raw", "swa"]),
        (dict(SWA_ENABLED=0), ["raw", "ema"]),
        (dict(WARMDOWN_ITERS=1), ["raw", "ema"]),
        (dict(EMA_ENABLED=0, SWA_ENABLED=0), ["raw"]),
    ],
    ids=str,
)
def test_only_what_is_enabled_and_has_begun_is_a_candidate(folder, extra, names):
    extra = dict(ITERATIONS=2, WARMDOWN_ITERS=20, SWA_EVERY=1, LATE_QAT=0) | extra
    trainer = trainer_of(folder, Choosing, Events(), **extra)
    trainer.run(validate, LIMIT)
    logged = trainer.run_of.hooks
    losses = dict(zip(logged.of("average", "average"), logged.of("average", "holdout_loss"), strict=True))
    assert list(losses) == names and same(trainer.given, trainer.last)
    assert logged.of("chosen", "average") == [min(losses, key=losses.get)]
    assert trainer.holdout_loss() == pytest.approx(min(losses.values()), rel=1e-6)


def test_the_average_with_the_least_holdout_loss_is_exported(folder):
    trainer, losses = trainer_of(folder), {}
    given = {
        name: snapshot(random_model(trainer.s, seed).parameters())
        for seed, name in enumerate(("raw", "ema", "swa"))
    }
    trainer.averages.candidates = lambda: given
    for name, weights in given.items():
        T.copy_weights(trainer.weights, weights)
        losses[name] = trainer.holdout_loss()
    trainer.choose()
    assert same(trainer.weights, given[min(losses, key=losses.get)])


def test_holdout_is_not_trained_on(folder):
    trainer = trainer_of(folder, HOLDOUT_TOKENS=200)
    tokens = T.read_stream(T.open_shards(folder, "train"), 0, 7000).tolist()
    length = len(trainer.holdout_tokens)
    assert length == 200 // 16 * 16 + 1  # whole sequences
    assert trainer.holdout_tokens.tolist() == tokens[-length:]
    assert sum(map(len, trainer.shards)) == 7000 - length
    assert T.read_stream(trainer.shards, 0, 14000).tolist() == (tokens[:-length] * 3)[:14000]


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
@pytest.mark.parametrize("step", [0, 3, 8])
def test_training_goes_on_from_its_state_as_if_it_had_not_ended(folder, step):
    """Weights, momenta, averages and the rounding are carried over; a trainer of another seed holds none
    of them before."""
    extra, kept = dict(SWA_EVERY=1, LATE_QAT_THRESHOLD=0.8), Kept(step)
    whole = trainer_of(folder, Choosing, kept, **extra)
    calibrations = [whole.run(validate, LIMIT)]
    again = trainer_of(folder, Choosing, Kept(state=kept.state), SEED=7, **extra)
    calibrations.append(again.run(validate, LIMIT))
    assert (again.done, len(again.measured)) == (8, 8 - step)
    assert same(again.measured, whole.measured[step:]) and same(again.weights, whole.weights)
    assert same(again.last, whole.last)
    assert again.averages.samples == whole.averages.samples > 0
    assert same(again.averages.ema, whole.averages.ema) and same(again.averages.swa, whole.averages.swa)
    for parts in (lambda c: c.moments, lambda c: c.fisher):
        one, other = map(parts, calibrations)
        assert same(other.values(), one.values())
    assert again.knob == whole.knob and same(again.steps.values(), whole.steps.values())
    assert kept.state["done"] == step and again.elapsed > kept.state["elapsed"] * (step < 8)


@pytest.mark.parametrize(
    "extra, passes", [({}, 4), (dict(EMA_ENABLED=0), 3), (dict(EMA_ENABLED=0, SWA_ENABLED=0), 2)]
)
def test_the_time_that_is_kept_is_that_of_the_candidates(folder, monkeypatch, extra, passes):
    """A pass over the held-out text for each, one to spare, and one and a half calibrations; as measured on a
    part of the text if it is long, for a CPU."""
    trainer, now, read = trainer_of(folder, WARMUP_STEPS=0, HOLDOUT_TOKENS=640, **extra), [0.0], []

    def pass_over(part, seconds):
        read.append(part - 1)
        now[0] += seconds * (part - 1)

    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer.holdout_loss, trainer.calibrate = partial(pass_over, seconds=1), partial(pass_over, seconds=100)
    assert trainer.warm_up() == 640 * (passes + 150) and set(read) == {640}
    monkeypatch.setattr(T, "WARM_UP_TOKENS", 50)
    read.clear()
    assert trainer.warm_up() == pytest.approx(640 * (passes + 150)) and set(read) == {48}


def test_a_part_of_the_held_out_tokens_is_its_beginning(folder):
    trainer, first = (trainer_of(folder, HOLDOUT_TOKENS=640) for _ in range(2))
    first.holdout_tokens = first.holdout_tokens[:97]
    assert trainer.holdout_loss(97) == first.holdout_loss() != trainer.holdout_loss()
    found, whole = trainer.calibrate(97), first.calibrate()
    assert all(torch.equal(found.moments[name], m) for name, m in whole.moments.items())


def test_warm_up_says_what_it_will_take(folder, monkeypatch):
    """After the second step, as if each step and each pass over as many tokens took as long."""
    trainer = trainer_of(folder, SlowTrainer, Events(), WARMUP_STEPS=5)
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: trainer.now))
    trainer.seconds = dict(step=2, holdout=0, calibration=0)
    trainer.warm_up()
    held_out = len(trainer.holdout_tokens) - 1
    assert trainer.run_of.hooks.of("warming_up", "left") == [2000 * (3 + 2.7 * held_out / 256)]


def test_a_steps_gradients_are_those_of_all_micro_batches_at_once(folder):
    """The cast matrices are leaves: gradients are added up there and go through the cast once."""
    trainer = trainer_of(folder, MICRO_BATCH_TOKENS=64, TRAIN_BATCH_TOKENS=512)
    start_qat(trainer)
    with trainer.loader() as spans:
        spans = next(spans)
    found, whole = {}, trainer.model
    trainer.optimizers.step = lambda *_: (
        found.update({name: p.grad.clone() for name, p in whole.named_parameters()}) or torch.tensor(0.0)
    )
    trainer.train_step(spans, 1.0, 0.9)
    whole.zero_grad()
    x, y = spans[:, :-1].reshape(-1, 16).long(), spans[:, 1:].reshape(-1, 16).long()
    (whole(x, y, whole.matrices(trainer.steps)).sum() / 512).backward()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_state_is_of_the_shards_it_was_made_with(folder):
    state = trainer_of(folder).state_dict()
    with pytest.raises(T.RunError, match="train shards of .* tokens, not"):
        trainer_of(folder, HOLDOUT_TOKENS=16).load_state_dict(state)


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


def test_a_clock_goes_on_and_leaves_out_what_is_spent_aside(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(T, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = T.Clock()
    now[0] += 3
    clock.apart += 2
    now[0] += 2
    now[0] += 1
    assert (clock.seconds(), clock.seconds() - clock.apart) == (6, 4)
    again = T.Clock()
    again.load_state_dict(clock.state_dict())
    now[0] += 1
    assert again.seconds() == 7
    clock.add(-2)
    assert clock.seconds() == 5


# Late QAT


@pytest.mark.parametrize("threshold, rounded_steps", [(0, 0), (0.3, 2), (1, 7)])
def test_qat_rounds_from_its_threshold_on_to_fixed_steps(folder, threshold, rounded_steps):
    trainer, steps = trainer_of(folder, LATE_QAT_THRESHOLD=threshold), []

    def note(model, args):
        if torch.is_grad_enabled():
            up = trainer.model.up_bank.detach()
            if trainer.steps is not None:
                step = trainer.steps["up_bank"]
                up = (up / step).round() * step
            assert torch.equal(args[2].up, up)
            steps.append((trainer.done, trainer.steps))

    trainer.model.register_forward_pre_hook(note)
    trainer.run(validate, LIMIT)
    training = {done: used for done, used in steps if used is not None}
    assert len(training) == rounded_steps and all(used is trainer.steps for used in training.values())
    assert {done for done, _ in steps} == set(range(8))
    assert trainer.knob == 1 and trainer.steps.keys() == trainer.model.quantized().keys()


def test_every_step_under_qat_uses_rounded_matrices_and_moves_the_unrounded_weights(folder):
    trainer = trainer_of(folder, MATRIX_LR=1e-4, WARMUP_STEPS=0)
    trainer.fix_steps(trainer.calibrate().fisher, LIMIT)
    trainer.steps = {name: 8 * step for name, step in trainer.steps.items()}
    used = []
    trainer.model.register_forward_pre_hook(
        lambda model, args: used.append([m.detach().clone() for m in args[2]])
    )
    before = trainer.model.up_bank.detach().clone()
    with trainer.loader() as spans:
        trainer.train_step(next(spans), 1.0, 0.9)
    up = used[0][2]
    assert torch.equal(
        up, (before / trainer.steps["up_bank"]).round() * trainer.steps["up_bank"]
    ) and not torch.equal(up, before)
    moved = trainer.model.up_bank - before
    assert 0 < moved.abs().max() < 0.01  # from where they were, not from where they were rounded to


def test_micro_batches_change_nothing(folder):
    """One span at a time, two sequences at a time, or a step at once: the same losses and gradient norms."""
    runs = []
    for tokens in (0, 32, 256):
        trainer = trainer_of(folder, MICRO_BATCH_TOKENS=tokens, ITERATIONS=3)
        trainer.run(validate, LIMIT)
        runs.append(trainer)
    for other in runs[1:]:
        torch.testing.assert_close(
            torch.stack(other.measured), torch.stack(runs[0].measured), rtol=1e-4, atol=1e-5
        )


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
        updates.append([T.muon_update(scale * grad, buffer, 0.95, 5) for grad in grads])
    for other in updates[1:]:
        for a, b in zip(updates[0], other, strict=True):
            assert (a - b).float().norm() < 1e-2 * a.float().norm()
    values = torch.linalg.svdvals(updates[0][-1].float())
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("extra", [dict(), dict(BIGRAM_VOCAB_SIZE=0, VE_ENABLED=0)])
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
    special = dict(tok_emb=0.01, bigram_table=0.01, ve_table=0.01)
    for name, rate in rates:
        assert rate == special.get(name, 0.04), name


def test_banks_move_by_muon_at_the_matrix_learning_rate():
    s = settings(MATRIX_LR=0.05, MUON_WD=0.1, GRAD_CLIP_NORM=0)
    model = random_model(s)
    banks, (_, grads) = [bank.detach().clone() for bank in model.banks()], backward(model, *random_batch())
    grads = dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))
    T.Optimizers(model, s).step(0.5, 0.9)
    for name, bank, before in zip(model.BANKS, model.banks(), banks, strict=True):
        update = T.muon_update(grads[name], torch.zeros_like(before, dtype=torch.bfloat16), 0.9, 5)
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


# Switches and initial weights


@pytest.mark.parametrize(
    "extra",
    [
        dict(),
        dict(BIGRAM_VOCAB_SIZE=0),
        dict(BIGRAM_DIM=32),
        dict(VE_ENABLED=0),
        dict(VE_LAYERS=""),
        dict(VE_DIM=16),
        dict(NUM_LAYERS=1, VE_LAYERS=0),
        dict(NUM_LAYERS=2, VE_LAYERS="0,1"),
        dict(XSA_LAST_N=0),
        dict(XSA_LAST_N=9),
        dict(LN_SCALE=0),
        dict(NUM_KV_HEADS=4),
        dict(NUM_HEADS=1, NUM_KV_HEADS=1, ROPE_DIMS=32),
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
