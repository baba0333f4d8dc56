"""The numbers of record_parity.npz (another file of the same form: RECORD_PARITY_NPZ=path), within its
tolerances."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as T
from tests.helpers import muon_update, score_first_ttt
from tools.measure import quant_report as Q

DATA = np.load(os.environ.get("RECORD_PARITY_NPZ") or Path(__file__).with_name("record_parity.npz"))
CONFIG = json.loads(str(DATA["config"]))
RUNS = [key.split("/")[1] for key in DATA.files if key.startswith("ttt_settings/")]
NAMES = [key[2:] for key in DATA.files if key.startswith("w/")]
CPU_HAS_BF16 = (
    torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False
)
MUON_TOLERANCE = 2e-3 if CPU_HAS_BF16 else 5e-3


def tensor(key):
    return torch.from_numpy(DATA[key])


def settings(**extra):
    values = {"TRAIN_BATCH_TOKENS": 8 * CONFIG["TRAIN_SEQ_LEN"], **CONFIG, **extra}
    return T.parse_settings({name: str(value) for name, value in values.items()})


def unbanked(model, name, gradient=False):
    """The part of the model's parameters (or gradients) that the file calls `name`."""
    get = (lambda p: p.grad) if gradient else (lambda p: p.detach())
    L = len(model.blocks)
    if name.startswith("blocks."):
        layer, part = int(name.split(".")[1]), name.split(".", 2)[2]
        banked = {
            "attn.c_q.weight": (model.qo_bank, 0),
            "attn.proj.weight": (model.qo_bank, L),
            "attn.c_k.weight": (model.kv_bank, 0),
            "attn.c_v.weight": (model.kv_bank, L),
            "mlp.fc.weight": (model.up_bank, 0),
            "mlp.proj.weight": (model.down_bank, 0),
        }
        if part in banked:
            bank, offset = banked[part]
            return get(bank)[offset + layer]
        return get(getattr(model.blocks[layer], part.removeprefix("attn.")))
    if name.startswith("ve_layer_scales."):
        index = int(name.split(".")[1])
        return get(model.ve_layer_scales)[index : index + 1]
    plain = {
        "tok_emb.weight": "tok_emb",
        "skip_weights": "skip_weights",
        "smear.gate": "smear_gate",
        "bigram.scale": "bigram_scale",
        "bigram.embed.weight": "bigram_table",
        "bigram.proj.weight": "bigram_proj",
        "ve_shared.scale": "ve_scale",
        "ve_shared.embed.weight": "ve_table",
        "ve_shared.proj.weight": "ve_proj",
    }
    return get(getattr(model, plain[name]))


def record_model(s):
    model = T.GPT(s)
    with torch.no_grad():
        for name in NAMES:
            unbanked(model, name).copy_(tensor("w/" + name))
    return model


def assert_close(value, reference, tolerance):
    value, reference = torch.as_tensor(value).double(), torch.as_tensor(reference).double()
    assert value.shape == reference.shape
    assert (value - reference).norm() <= tolerance * reference.norm()


def test_the_file_names_every_weight():
    model = T.GPT(settings())
    assert sum(unbanked(model, name).numel() for name in NAMES) == sum(p.numel() for p in model.parameters())


def test_logits_loss_and_gradients():
    model = record_model(settings())
    assert_close(model.logits(tensor("x")), tensor("logits"), 1e-4)
    loss = model(tensor("x"), tensor("y")).mean()
    assert_close(loss.detach(), float(DATA["loss"]), 1e-4)
    loss.backward()
    for name in NAMES:
        assert_close(unbanked(model, name, gradient=True), tensor("grad/" + name), 1e-4)


def test_rotary_base_grows_with_long_sequences():
    with torch.no_grad():
        logits = record_model(settings()).logits(tensor("long_x"))
    assert_close(logits[:, -DATA["long_logits_tail"].shape[1] :], tensor("long_logits_tail"), 1e-4)


def scorer_of(model, s):
    tables = T.ByteTables(*(tensor(key) for key in ("base_bytes", "has_leading_space", "is_boundary")))
    return T.Scorer(model, tensor("tokens").int(), tables, s.eval_seq_len, batch_tokens=7 * s.eval_seq_len)


def test_sliding_score():
    s = settings()
    score = scorer_of(record_model(s), s).score_windows(s.eval_stride)
    assert_close([score.val_loss, score.val_bpb], tensor("sliding"), 1e-4)
    assert score.tokens == len(DATA["tokens"]) - 1


@pytest.mark.parametrize("run", RUNS)
def test_ttt(run):
    s = settings(**json.loads(str(DATA[f"ttt_settings/{run}"])))
    model = record_model(s)
    score, records = score_first_ttt(scorer_of(model, s), s)
    loss_tolerance, norm_tolerance = (2e-4, 1e-3) if s.ttt_muon else (1e-4, 1e-4)
    assert_close([score.val_loss, score.val_bpb], tensor(f"ttt/{run}"), loss_tolerance)
    assert [epochs for score, epochs in records[:-1]] == DATA[f"ttt_epochs/{run}"].tolist()
    norms = torch.stack([unbanked(model, name).norm() for name in NAMES])
    assert_close(norms, tensor(f"ttt_norm/{run}"), norm_tolerance)
    if f"ttt_chunk_nll/{run}" in DATA.files:
        assert_close([score.val_loss for score, epochs in records[:-1]], tensor(f"ttt_chunk_nll/{run}"), 1e-3)


@pytest.mark.parametrize("steps", [3, 5])
def test_newton_schulz(steps):
    assert_close(T.newton_schulz(tensor("ns_in"), steps), tensor(f"ns_out{steps}"), 2e-3)


@pytest.mark.parametrize("prefix", ["muon_", "muon_tall_"])
def test_muon_steps(prefix):
    p = tensor(prefix + "p0").clone()
    buffer = torch.zeros_like(p, dtype=torch.bfloat16)
    steps = sum(key.startswith(prefix + "g") for key in DATA.files)
    for i in range(steps):
        before = p.clone()
        T.apply_muon_update(p, muon_update(tensor(f"{prefix}g{i}"), buffer, 0.95), lr=0.02, weight_decay=0.04)
        change = tensor(f"{prefix}p{i + 1}") - tensor(f"{prefix}p{i}")
        assert_close(p - before, change, MUON_TOLERANCE)


def assert_integers_match(q, reference):
    difference = (q.int() - reference.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


def test_int6_quantizer_with_the_records_floor():
    w = tensor("q6_in")
    scale = Q.clip_steps(w, Q.CLIP_QUANTILES, 31, floor=1 / 31)
    assert torch.equal(scale[:, 0].half(), tensor("q6_scale"))
    assert_integers_match((w / scale).round().clamp(-31, 31), tensor("q6_q"))


def test_int8_quantizer():
    """The record rounds these with the fp32 scale; the program rounds them, too, with the one it stores."""
    w = tensor("q6_in")
    scale = Q.clip_steps(w, [0.9999984], 127, floor=1 / 127, dtype=torch.float)
    assert torch.equal(scale[:, 0].half(), tensor("q8_scale").flatten())
    assert_integers_match((w / scale).round().clamp(-127, 127), tensor("q8_q"))
