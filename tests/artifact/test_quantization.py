"""The steps and GPTQ: what is rounded how finely, and that the loss rises as little as promised."""

import math
import types

import pytest
import torch
import torch.nn.functional as F

import train_gpt as T
from tests.helpers import made_up_tokens, random_model, settings
from tools.measure import quant_report as Q
from tools.measure.quant_report import record_quantize, record_steps

SETTINGS = dict(TRAIN_SEQ_LEN=16)


@pytest.fixture(scope="module")
def model():
    return random_model(settings(**SETTINGS))


@pytest.fixture(scope="module")
def tokens():
    return torch.as_tensor(made_up_tokens(40 * 16 + 5)).int()


@pytest.fixture(scope="module")
def calibrated(model, tokens):
    return T.calibrate(model, tokens, 16)


# The record's steps


def bank_with_outliers():
    """(6, 5, 3000): rows of all sizes, matrices with ever fewer and larger outliers."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(6, 5, 3000, generator=generator) * torch.logspace(-3, 1, 5)[:, None]
    rare = torch.tensor([1, 20, 50, 100, 200, 400])[:, None, None]
    return bank * (1 + 4 * torch.rand(bank.shape, generator=generator) ** rare)


def test_int6_takes_the_clip_quantile_of_least_error_for_each_matrix():
    chosen = set()
    for matrix in bank_with_outliers():
        errors, options = [], []
        for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1):
            clip = torch.quantile(matrix.abs(), quantile, dim=-1, keepdim=True)
            options.append((clip / 31).half().float())
            q = (matrix / options[-1]).round().clamp(-31, 31)
            errors.append(((q * options[-1] - matrix) ** 2).mean().item())
        best = errors.index(min(errors))
        chosen.add(best)
        assert torch.equal(Q.clip_steps(matrix, Q.CLIP_QUANTILES, 31), options[best])
    assert len(chosen) > 1


def test_the_first_of_equal_clip_quantiles_wins():
    matrix = torch.tensor([[0, 31, 31 * (1 + 2**-10)]])  # either clip moves one entry by 31 / 1024
    for quantiles, step in (((0.5, 1.0), 1), ((1.0, 0.5), 1 + 2**-10)):
        assert Q.clip_steps(matrix, quantiles, 31).item() == step


# Calibration


def test_moments_are_those_of_what_each_matrix_multiplies(model, tokens, calibrated):
    """As a plain F.linear in its place sees them."""
    moments = calibrated.moments
    x = tokens[:640].view(40, 16).long()
    seen = {}
    linear = F.linear
    owners = {}
    matrices = model.matrices()
    assert tuple(moments) == matrices._fields
    for name, m in zip(moments, matrices, strict=True):
        owners |= {m[i].data_ptr(): (name, i) for i in range(len(m))}

    def watched(x, w, *args):
        if w.data_ptr() in owners:
            seen[owners[w.data_ptr()]] = x.detach().reshape(-1, x.size(-1)).double()
        return linear(x, w, *args)

    F.linear = watched
    try:
        model.logits(x, matrices)
    finally:
        F.linear = linear
    L = len(model.blocks)
    for i in range(L):
        for name, moment in moments.items():
            inputs = seen[name, i]
            torch.testing.assert_close(moment[i].double(), inputs.T @ inputs / 640, rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_again_has_the_moments_of_all_its_runs(tokens):
    model = random_model(settings(**SETTINGS, LOOP_LAYERS=1, LOOP_COUNT=2))
    with_loops, inputs = T.calibrate(model, tokens, 16).moments, []
    mlp = model.blocks[1].mlp
    model.blocks[1].mlp = lambda x, m, f: inputs.append(x.detach().flatten(0, 1).double()) or mlp(x, m, f)
    model.logits(tokens[:640].view(40, 16).long())
    assert len(inputs) == 3
    expected = sum(x.T @ x for x in inputs) / 640
    torch.testing.assert_close(with_loops["up"][1].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_without_input_is_an_error():
    """GPTQ would quietly be plain rounding there."""
    moments = torch.eye(8).repeat(2, 1, 1)
    moments[1] = 0
    with pytest.raises(torch.linalg.LinAlgError):
        T.factor(moments)


def test_a_weight_error_raises_the_loss_by_half_its_square_times_the_fisher_information(
    model, tokens, calibrated
):
    """KL divergence from the model's own predictions, rows moved at random."""
    fisher = calibrated.fisher
    x, weights = tokens[:640].view(40, 16).long(), model.quantized()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model.logits(x).log_softmax(-1)
        for name in ("qo_bank", "up_bank", "down_bank", "tok_emb"):
            w, old, ratios = weights[name], weights[name].clone(), []
            for _ in range(6):
                error = 0.003 * torch.randn(w.shape, generator=generator)
                w.add_(error)
                rise = (before.exp() * (before - model.logits(x).log_softmax(-1))).sum(-1).mean()
                ratios.append((rise / (fisher[name] * error**2 / 2).sum()).item())
                w.copy_(old)
            assert 0.5 < sum(ratios) / len(ratios) < 2, (name, ratios)


# Steps


def test_gptq_steps_are_a_twelfth_of_a_rows_rms_and_worth_the_same(model, calibrated):
    """On the whole; which is about as fine as the record's."""
    fisher = calibrated.fisher
    record, steps = record_steps(model), T.base_steps(model, fisher)
    rms = {name: getattr(model, name).square().mean(-1, keepdim=True).sqrt() for name in model.BANKS}
    sizes = {name: getattr(model, name).numel() for name in rms}
    of_rms, of_record = (
        sum((steps[name].log2() - found[name].log2()).mean().item() * size for name, size in sizes.items())
        / sum(sizes.values())
        for found in (rms, record)
    )
    assert 2**-of_rms == pytest.approx(12, rel=1e-4) and abs(of_record) < 0.7
    for name, step in steps.items():
        worth = step**2 * fisher[name]
        inside = (fisher[name] / fisher[name].mean((-2, -1), keepdim=True)).log2().abs() < 6
        if name == "qo_bank":
            level = worth[inside].median()
        torch.testing.assert_close(worth[inside], level.expand_as(worth[inside]), rtol=1e-3, atol=0)
        assert (step.amax((-2, -1)) <= 65 * step.amin((-2, -1))).all()


def test_a_knob_moves_all_steps_by_eighths_of_octaves(model, calibrated):
    base = T.base_steps(model, calibrated.fisher)
    for knob in (0.3, 1.0, 3.3):
        for name, step in T.scaled(base, knob).items():
            assert torch.equal(step, step.half().float())
            eighths = 8 * step.log2()
            assert (eighths - eighths.round()).abs().max() < 0.02 and (
                (step / base[name] / knob).log2().abs() < 0.07
            ).all()


def test_rows_that_are_zero_or_feel_nothing_are_rounded_all_the_same():
    model = T.GPT(settings())  # every bank is zero
    fisher = {name: torch.zeros_like(w[..., :1]) for name, w in model.quantized().items()}
    steps = T.scaled(T.base_steps(model, fisher), 1.0)
    factors = {
        name: T.factor(torch.eye(m.size(-1)).repeat(len(m), 1, 1))
        for name, m in model.matrices()._asdict().items()
    }
    by_gptq = T.quantize(model.state_dict(), steps, factors)
    for stored in (by_gptq, record_quantize(model.state_dict(), record_steps(model), 1.0)):
        weights = T.dequantize(stored)
        assert all(w.isfinite().all() for w in weights.values())
        assert not any(weights[name].any() for name in model.BANKS)


def test_no_row_is_so_fine_that_its_integers_run_out(model, calibrated):
    """Where the loss feels one matrix alone, as in the first step, when the others multiply zeros."""
    fisher = {name: f * (1e-12 if name != "up_bank" else 1) for name, f in calibrated.fisher.items()}
    steps = T.scaled(T.base_steps(model, fisher), 0.25)
    for name, w in model.quantized().items():
        assert (w / steps[name]).abs().max() <= T.MOST


# GPTQ


def plain_gptq(w, step, moment):
    """One column after the other, the inverse of what is left computed anew each time."""
    w, q, left = w.double().clone(), torch.empty_like(w), moment.diagonal().argsort(descending=True).tolist()
    moment = moment.double() + 0.05 * moment.double().trace() / len(moment) * torch.eye(len(moment))
    while left:
        inverse = torch.linalg.inv(moment[left][:, left])
        j, rest = left[0], left[1:]
        q[:, j] = (w[:, j] / step).round()
        error = (w[:, j] - q[:, j] * step) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0, 1:]
        left = rest
    return q


def correlated_inputs(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return x.T @ x / len(x)


def test_gptq_is_the_plain_algorithm():
    bank = torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(1))
    moments = torch.stack([correlated_inputs(200, seed) for seed in range(2)])
    step = torch.full((2, 6, 1), 0.3)
    q = T.gptq(bank, step, T.factor(moments.clone()))
    expected = torch.stack([plain_gptq(w, 0.3, m) for w, m in zip(bank, moments, strict=True)])
    assert (q != expected).float().mean() < 0.01  # fp32 against fp64


def test_gptq_errs_less_where_inputs_are_correlated_and_rounds_where_they_are_not():
    bank, moments = (
        torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(1)),
        correlated_inputs(96)[None],
    )
    step = torch.full((1, 64, 1), 0.5)

    def error(q):
        return torch.einsum("nri,nij,nrj->", *[q * step - bank, moments, q * step - bank]).item()

    nearest = (bank / step).round()
    assert error(T.gptq(bank, step, T.factor(moments.clone()))) < 0.5 * error(nearest)
    assert torch.equal(T.gptq(bank, step, T.factor(torch.diag_embed(torch.rand(1, 96) + 0.5))), nearest)


# Size


def test_the_knob_is_one_or_lands_just_under_the_limit(tokens):
    model = random_model(settings(MODEL_DIM=192, NUM_LAYERS=1, VE_LAYERS=0))
    base, weights = T.base_steps(model, T.calibrate(model, tokens, 16).fisher), model.state_dict()

    def size(knob):
        return T.estimate_bytes(T.quantize(weights, T.scaled(base, knob)))

    assert T.fit_knob(model, size, size(1.0), 1.0) == 1 == T.fit_knob(model, size, 10**9, 7.0)
    for part in (0.95, 0.8):
        limit = part * size(1.0)
        for start in (1.0, 9.0):
            knob = T.fit_knob(model, size, limit, start)
            assert limit - 20_000 < size(knob) <= limit and knob > 1
    assert T.fit_knob(model, size, 1, 1.0) > 1000  # nothing would do


def test_the_knob_is_the_last_one_that_was_tried_when_tries_run_out():
    """So that what was packed last is what is written."""
    model, tried = T.GPT(settings(MODEL_DIM=192)), []

    def never(knob):
        tried.append(knob)
        return 10**6 + len(tried) % 2 * 9_000 + 1

    assert T.fit_knob(model, never, 10**6, 2.0) == tried[-1] and len(tried) == 16
    assert tried[0] == 2.0 and len(set(tried)) > 2


@pytest.mark.parametrize("limit", [2_000_000, 1_431_000, 610_000])
def test_a_size_that_falls_in_jumps_fits_at_last(limit):
    """As where all rows have one step: the steps' eighths of octaves then jump together, past the slack."""
    weights, sizes = 2_400_000, []
    model = types.SimpleNamespace(quantized=lambda: {"a weight": torch.empty(weights, device="meta")})
    jump = weights / 8 / 8  # an octave of the knob is a bit a weight
    assert jump > T.SLACK_BYTES

    def size(knob):
        sizes.append(weights - jump * round(8 * math.log2(knob)))
        return sizes[-1]

    knob = T.fit_knob(model, size, limit, 1.0)
    assert limit - jump < sizes[-1] <= limit and knob > 1 and len(sizes) <= 16
