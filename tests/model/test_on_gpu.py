"""On a GPU: the numbers of record_parity.npz, each attention kernel against plain arithmetic, a stream
against windows, and no score that knows what comes after it. Skipped where there is no GPU;
GPU_TESTS_DEVICE=cpu tries the tests themselves."""

import json
import math
import os
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tests.model.test_frontier_parity as frontier
import tests.model.test_record_parity as record
import train_gpt as T
from tests.helpers import (
    FRONTIER,
    PerTarget,
    attention_by,
    made_up_tokens,
    muon_update,
    random_model,
    score_first_ttt,
    score_stream,
    scorer_of,
    settings,
)
from tests.model.test_record_parity import NAMES, RUNS, assert_close, record_model, tensor, unbanked

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE") or "cuda")
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def relative(value, reference):
    """The norm of the difference over that of the reference."""
    value, reference = (torch.as_tensor(t).detach().double().cpu() for t in (value, reference))
    return ((value - reference).norm() / reference.norm()).item()


def model_on_device(s, dtype=torch.float32):
    model = record_model(s)
    model.dtype = dtype
    return model.to(DEVICE)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_logits_loss_and_gradients(dtype, tolerance):
    model = model_on_device(record.settings(), dtype)
    assert_close(model.logits(tensor("x").to(DEVICE)).detach().cpu(), tensor("logits"), tolerance)
    loss = model(tensor("x").to(DEVICE), tensor("y").to(DEVICE)).mean()
    assert_close(loss.detach().cpu(), float(record.DATA["loss"]), tolerance / 10)
    loss.backward()
    least = (
        0 if dtype == torch.float32 else 1000
    )  # elements: a scalar's gradient is a sum that cancels in bf16
    worst = max(
        (relative(unbanked(model, name, gradient=True), tensor("grad/" + name)), name)
        for name in NAMES
        if tensor("grad/" + name).numel() > least
    )
    print(f"worst gradient: {worst}")
    assert worst[0] < (tolerance if dtype == torch.float32 else 0.2)


def test_long_sequences():
    with torch.no_grad():
        logits = model_on_device(record.settings()).logits(tensor("long_x").to(DEVICE)).cpu()
    assert_close(logits[:, -record.DATA["long_logits_tail"].shape[1] :], tensor("long_logits_tail"), 1e-4)


@pytest.mark.parametrize("run", ["sliding", *RUNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores(run, dtype):
    ttt = run != "sliding"
    s = record.settings(**(json.loads(str(record.DATA[f"ttt_settings/{run}"])) if ttt else {}))
    model = model_on_device(s, dtype)
    tables = T.ByteTables(
        *(tensor(key).to(DEVICE) for key in ("base_bytes", "has_leading_space", "is_boundary"))
    )
    scorer = T.Scorer(
        model, tensor("tokens").int().to(DEVICE), tables, s.eval_seq_len, batch_tokens=7 * s.eval_seq_len
    )
    score = score_first_ttt(scorer, s)[0] if ttt else scorer.score_windows(s.eval_stride)
    reference = tensor(f"ttt/{run}" if ttt else "sliding")
    difference = relative([score.val_loss, score.val_bpb], reference)
    print(f"{run}, {dtype}: {difference:.1e}")
    assert difference < (5e-3 if dtype == torch.bfloat16 else 2e-4 if ttt and s.ttt_muon else 1e-4)


@pytest.mark.parametrize("steps", [3, 5])
def test_newton_schulz(steps):
    difference = relative(T.newton_schulz(tensor("ns_in").to(DEVICE), steps), tensor(f"ns_out{steps}"))
    print(f"Newton-Schulz, {steps} steps: {difference:.1e}")
    assert difference < 1e-2


@pytest.mark.parametrize("prefix", ["muon_", "muon_tall_"])
def test_muon_steps(prefix):
    p = tensor(prefix + "p0").to(DEVICE)
    buffer = torch.zeros_like(p, dtype=torch.bfloat16)
    for i in range(sum(key.startswith(prefix + "g") for key in record.DATA.files)):
        before = p.clone()
        T.apply_muon_update(
            p, muon_update(tensor(f"{prefix}g{i}").to(DEVICE), buffer, 0.95), lr=0.02, weight_decay=0.04
        )
        difference = relative(p - before, tensor(f"{prefix}p{i + 1}") - tensor(f"{prefix}p{i}"))
        print(f"{prefix} step {i}: {difference:.1e}")
        assert (
            difference < 7e-2
        )  # other roundings of bf16, magnified by Newton-Schulz; a missing Nesterov term gives 0.18


def plain_attention(q, k, v, window, documents=None):
    """In fp32 and by einsum: a position sees itself and `window` - 1 before, perhaps of its own document
    only."""
    P, length = k.size(1) - q.size(1), k.size(1)
    at, seen = torch.arange(P, length, device=q.device)[:, None], torch.arange(length, device=q.device)
    sees = ((seen <= at) & (seen > at - window))[None]
    if documents is not None:
        sees = sees & (documents[:, P:, None] == documents[:, None])
    k, v = (t.float().repeat_interleave(q.size(2) // t.size(2), 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * q.size(-1) ** -0.5
    weights = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def random_heads(B, T_q, T_k, H=8, K=4, d=64):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(B, t, n, d, generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for t, n in ((T_q, H), (T_k, K), (T_k, K))
    ]


def assert_same_attention(attention, heads, *plain):
    """Outputs and gradients, to the precision of bf16."""
    reference = plain_attention(*heads, *plain)
    weight = torch.randn(reference.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    expected = torch.autograd.grad((reference * weight).sum(), heads)
    found = attention(*heads)
    gradients = torch.autograd.grad((found.float() * weight).sum(), heads)
    assert found.shape == reference.shape
    differences = [relative(a, b) for a, b in zip((found, *gradients), (reference, *expected), strict=True)]
    print("differences of output and gradients:", *(f"{d:.1e}" for d in differences))
    assert max(differences) < 2e-2


@contextmanager
def only(kernel):
    """That of PyTorch's kernels; skipped where it takes no such input."""
    try:
        with sdpa_kernel(kernel):
            yield
    except RuntimeError as e:
        if "kernel" not in str(e).lower() and "backend" not in str(e).lower():
            raise
        pytest.skip(f"{kernel.name} does not run here: {' '.join(str(e).split())[:200]}")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("case", ["causal", "window"])
def test_attention_kernels(kernel, case):
    with only(kernel):
        if case == "causal":
            assert_same_attention(T.attention, random_heads(2, 512, 512), 512)
        else:  # 128 positions behind 384 others
            mask = T.window_mask(384, 128, DEVICE)
            assert_same_attention(lambda q, k, v: T.attention(q, k, v, mask), random_heads(2, 128, 512), 384)


@pytest.mark.parametrize("longest", [512, 100])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_attention_within_documents(longest, dtype, tolerance):
    """As plain arithmetic that masks the other documents, its gradients too."""
    q, k, v = (t.to(dtype).requires_grad_() for t in random_heads(2, 512, 512, H=8, K=4))
    tokens = torch.full((2, 512), 7, device=DEVICE)
    tokens[0, [37, 200, 201, 450]] = tokens[1, [5, 300]] = T.BOS
    pieces = T.document_pieces(tokens, longest)
    number = torch.bucketize(torch.arange(1024, device=DEVICE), pieces, right=True).view(2, 512)
    mask = (number[:, :, None] == number[:, None]).tril()[:, None]
    found, plain = T.piece_attention(q, k, v, pieces, 512), T.attention(q, k, v, mask)
    assert relative(found, plain) < tolerance
    weights = torch.randn_like(plain)
    for a, b in zip(
        *(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, plain)), strict=True
    ):
        assert relative(a, b) < 2 * tolerance


@pytest.mark.parametrize("way", frontier.WAYS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
def test_the_frontiers_logits_and_loss(way, dtype, tolerance):
    model, x, y, pieces = frontier.prepared(way)
    model.dtype, pieces = dtype, None if pieces is None else pieces.to(DEVICE)
    model, x, y = model.to(DEVICE), x.to(DEVICE), y.to(DEVICE)
    with torch.no_grad():
        logits = model.logits(x, None, model.context(x, pieces=pieces))
        loss = model(x, y, None, model.context(x, pieces=pieces)).mean().item()
    assert_close(logits.cpu(), frontier.tensor(f"{way}/logits"), tolerance)
    assert_close(loss, float(frontier.DATA[f"{way}/loss"]), tolerance / 10)


def scorer_on_device(s, tokens, dtype):
    model = random_model(s)
    model.dtype = dtype
    return scorer_of(model.to(DEVICE), s, tokens, PerTarget())


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"]
)
def test_a_stream_scores_like_the_whole_text_at_once(dtype, tolerance):
    """Over all layers, each of which sees the last 24 positions."""
    s, tokens = settings(EVAL_SEQ_LEN=24), made_up_tokens(201)
    streamed = scorer_on_device(s, tokens, dtype)
    score_stream(streamed, s)
    whole = random_model(s).to(DEVICE)
    whole.dtype = dtype
    text = torch.as_tensor(tokens).long().to(DEVICE)
    banded = attention_by(lambda q, k, v, mask=None: plain_attention(q, k, v, 24).to(q.dtype))
    with torch.no_grad(), banded:
        nll = whole(text[None, :-1], text[None, 1:])[0].double()
    difference = (streamed.hooks.nll - nll).abs().max().item()
    print(f"{dtype}: at most {difference:.1e} nats apart")
    assert difference < tolerance


@pytest.mark.parametrize("mode", ["sliding", "streaming"])
@pytest.mark.parametrize("ttt", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [{}, FRONTIER], ids=["record", "frontier"])
def test_a_changed_token_changes_no_score_before_it(mode, ttt, dtype, recipe):
    changes = dict(EVAL_SEQ_LEN=24, EVAL_STRIDE=8, TTT_CHUNK_TOKENS=48, TTT_LR=0.02, TTT_EPOCHS=2)
    s = settings(**recipe | changes | dict(EVAL_MODE=mode))
    found = []
    for change in (False, True):
        tokens = torch.as_tensor(made_up_tokens(301)).clone()
        if change:
            tokens[201:] = (tokens[201:] + 11) % 64
        scorer = scorer_on_device(s, tokens, dtype)
        if ttt:
            score_first_ttt(scorer, s)
        elif mode == "sliding":
            scorer.score_windows(8)
        else:
            score_stream(scorer, s)
        found.append(scorer.hooks.nll)
    assert torch.equal(found[0][:200], found[1][:200])
    assert not torch.equal(found[0][200:], found[1][200:])


@pytest.mark.parametrize("recipe", [{}, FRONTIER], ids=["record", "frontier"])
def test_a_stream_of_cuda_graphs_scores_like_one_without(recipe):
    """Compiled both ways, and learning twice from each chunk."""
    changes = dict(EVAL_MODE="streaming", EVAL_SEQ_LEN=24, TTT_CHUNK_TOKENS=48, TTT_LR=0.02, TTT_EPOCHS=2)
    s, found = settings(**recipe | changes), []
    for graphs in (False, True):
        torch._dynamo.reset()
        with torch._inductor.config.patch({"triton.cudagraphs": graphs}):
            scorer = scorer_on_device(s, made_up_tokens(601), torch.float32)
            scorer.model.on(DEVICE)
            score_first_ttt(scorer, s)
        found.append(scorer.hooks.nll)
    difference = (found[0] - found[1]).abs()
    print(f"with CUDA graphs at most {difference.max().item():.1e} nats apart")
    assert difference[:72].max() < 1e-4 and difference.mean() < 1e-2  # later ones learnt from roundings


def test_n_grams_are_the_cpus_and_their_time_and_memory_at_fineweb_size_are_told():
    """Of as many tokens as FineWeb's validation text has with a vocabulary of 8,192."""
    number, vocabulary = 40_500_000 if DEVICE.type == "cuda" else 20_000, 8192
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(number + 1, generator=generator) ** 8 * vocabulary).int()
    losses = 3 + torch.rand(number, generator=generator)
    some = slice(0, 20_000)
    expected = T.cache_losses(tokens[: some.stop + 1], losses[some], 6)
    tokens, losses, clock = tokens.to(DEVICE), losses.to(DEVICE), T.Clock()
    found = T.cache_losses(tokens, losses, 6)
    mixed, _ = T.mix(torch.cat((losses.expand(8, -1), found)), 0.2, 100)
    print(f"{number} tokens: {clock.seconds():.1f} s, {T.peak_memory():.0f} MiB at most")
    torch.testing.assert_close(found[:, some].cpu(), expected, rtol=1e-9, atol=1e-9)
    assert mixed.isfinite().all()
