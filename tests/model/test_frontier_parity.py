"""The numbers of frontier_parity.npz (another file of the same form: FRONTIER_PARITY_NPZ=path), within its
tolerances."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as T
from tests.helpers import muon_update

DATA = np.load(os.environ.get("FRONTIER_PARITY_NPZ") or Path(__file__).with_name("frontier_parity.npz"))
CONFIG = json.loads(str(DATA["config"]))
NAMES = [key[2:] for key in DATA.files if key.startswith("w/")]
WAYS = sorted({key.split("/")[0] for key in DATA.files if key.endswith("/logits")})
CPU_HAS_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
CHANGE_TOLERANCE = 7e-2  # of Muon's: the large coefficients magnify how bf16 rounds
POLAR_TOLERANCE = 2e-3 if CPU_HAS_BF16 else 7e-2
OURS = {
    "qo_bank": "qo_bank",
    "kv_bank": "kv_bank",
    "mlp_up_bank": "up_bank",
    "mlp_down_bank": "down_bank",
    "tok_emb.weight": "tok_emb",
    "skip_weights": "skip_weights",
    "skip_gates": "skip_gates",
    "smear_gate.weight": "smear_gate",
    "smear_lambda": "smear_lambda",
}
LANES = {"parallel_resid_lambdas": "lane_keep", "parallel_post_lambdas": "lane_gain"}


def tensor(key):
    return torch.from_numpy(DATA[key])


def settings(**extra):
    """What the file's configuration is called here."""
    c = CONFIG
    sizes = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims")
    values = {name.upper(): c[name] for name in (*sizes, "xsa_last_n")} | dict(
        LOOP_LAYERS=f"{c['loop_start']}-{c['loop_end']}",
        LOOP_COUNT=c["num_loops"],
        PARALLEL_FROM=c["parallel_start_layer"],
        ATTN_GATE_CHANNELS=c["gate_window"],
        ATTN_GATE_SCALE=c["sparse_attn_gate_scale"],
        SMEAR="token",
        SKIP_GATES=1,
        BIGRAM_VOCAB_SIZE=0,
        VE_LAYERS="",
        TRAIN_SEQ_LEN=32,
        TRAIN_BATCH_TOKENS=256,
    )
    return T.parse_settings({name: str(value) for name, value in {**values, **extra}.items()})


def ours(model, name, gradient=False):
    """The model's weight, or its gradient, in the form of the file; rows of no layer are zero."""
    get = (lambda p: p.grad) if gradient else (lambda p: p.detach())
    if name in LANES:
        blocks, like = [getattr(block, LANES[name], None) for block in model.blocks], tensor(f"w/{name}")
        rows = [torch.zeros_like(like[0]) if p is None else get(p) for p in blocks]
        return torch.stack(rows)
    if name.startswith("blocks."):
        _, layer, part = name.split(".", 2)
        part = part.removeprefix("attn.").replace("attn_gate_w", "attn_gate")
        return get(getattr(model.blocks[int(layer)], part))
    return get(getattr(model, OURS[name])).view_as(tensor(f"w/{name}"))


def frontier_model(s):
    """The model of the file's weights."""
    model = T.GPT(s)
    with torch.no_grad():
        for name in NAMES:
            if name in LANES:
                for block, row in zip(model.blocks, tensor(f"w/{name}"), strict=True):
                    if hasattr(block, LANES[name]):
                        getattr(block, LANES[name]).copy_(row)
            else:
                ours(model, name).copy_(tensor(f"w/{name}"))
    return model


def assert_close(value, reference, tolerance=1e-4):
    value, reference = torch.as_tensor(value).double(), torch.as_tensor(reference).double()
    assert value.shape == reference.shape
    assert (value - reference).norm() <= tolerance * reference.norm()


def test_the_file_names_every_weight_that_is_used():
    model, first = T.GPT(settings()), CONFIG["parallel_start_layer"]
    unused = first * sum(tensor(f"w/{name}")[0].numel() for name in LANES)  # of layers before the lanes
    assert sum(tensor(f"w/{name}").numel() for name in NAMES) - unused == sum(
        p.numel() for p in model.parameters()
    )


def prepared(way):
    """The file's model, x, y and the pieces of documents, if these are cut, of a way."""
    model, x = frontier_model(settings(DOCUMENT_ATTENTION=int("docs" in way))), tensor("x")
    model.looping = "loop" in way
    longest = int(way.rpartition("_")[2]) if way[-1].isdigit() else None
    return model, x, tensor("y"), T.document_pieces(x, longest) if longest else None


@pytest.mark.parametrize("way", WAYS)
def test_logits_loss_and_gradients(way):
    """With and without loops, documents, and documents cut into pieces."""
    model, x, y, pieces = prepared(way)
    context = model.context(x, pieces=pieces)
    logits = model.logits(x, None, context)
    assert_close(logits, tensor(f"{way}/logits"))
    loss = model(x, y, None, context).mean()
    assert_close(loss.detach(), float(DATA[f"{way}/loss"]))
    loss.backward()
    for name in NAMES:
        grad = ours(model, name, gradient=True)
        assert_close(grad.norm(), float(DATA[f"{way}/grad_norm/{name}"]))
        if f"{way}/grad/{name}" in DATA.files:
            assert_close(grad, tensor(f"{way}/grad/{name}"))


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_muon_steps(shape):
    p = tensor(f"muon_{shape}_p0").clone()
    buffer = torch.zeros_like(p, dtype=torch.bfloat16)
    for i in range(3):
        before = p.clone()
        T.apply_muon_update(
            p,
            muon_update(tensor(f"muon_{shape}_g{i}"), buffer, 0.9, row_norm=True, triples=T.POLAR),
            0.026,
            0.095,
        )
        change = tensor(f"muon_{shape}_p{i + 1}") - tensor(f"muon_{shape}_p{i}")
        assert_close(p - before, change, CHANGE_TOLERANCE)


@pytest.mark.parametrize("steps", [3, 5])
def test_polar_express(steps):
    found = T.newton_schulz(tensor("polar_in"), steps, T.POLAR)
    assert_close(found, tensor(f"polar_out{steps}"), POLAR_TOLERANCE)
