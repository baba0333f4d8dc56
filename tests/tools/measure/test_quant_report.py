"""tools.measure.quant_report: its matrices add up to the artifact, its methods are what they are called, its
sizes and its divergences are exact, and bad input ends in one line.
"""

import json
import math
import sys
from contextlib import chdir

import pytest
import torch

import train_gpt as T
from tests import tiny
from tests.forked import Process
from tests.helpers import byte_tables, made_up_tokens, random_model, settings
from tools.measure import quant_report as Q

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"


# Methods and sizes, on a model in memory


@pytest.fixture(scope="module")
def model():
    return random_model(settings(MODEL_DIM=96))


@pytest.fixture(scope="module")
def meter(model):
    return Q.Meter(model, torch.as_tensor(made_up_tokens(20 * 32 + 1, seed=5)).int(), byte_tables(), 32)


@pytest.fixture(scope="module")
def methods(model):
    moments, fisher = T.calibrate(model, torch.as_tensor(made_up_tokens(641)).int(), 16)
    factors = {name: T.factor(m) for name, m in moments.items()}
    nothing = torch.zeros(2, dtype=torch.int32)
    subject = Q.Subject(model, None, "f" * 64, byte_tables(), nothing, nothing)
    return [Q.Method(name, subject, factors, fisher) for name in Q.METHODS]


@pytest.fixture(scope="module")
def points(methods, meter):
    return Q.curves(methods, [4.0, 1.0], meter)


def test_unrounded_weights_do_not_diverge(model, meter):
    found = meter.compare(model.state_dict())
    assert found["kl"] == found["gap"] == found["gap_error"] == 0 and found["loss"] == meter.loss


def test_loss_and_divergence_are_those_of_all_tokens(model, meter):
    tokens = torch.as_tensor(made_up_tokens(20 * 32 + 1, seed=5)).int()
    moved = {name: w * 1.1 for name, w in model.state_dict().items()}
    found, other = meter.compare(moved), T.GPT(model.s)
    other.load_state_dict(moved)
    before, after = (T.Scorer(m, tokens, byte_tables(), 32, 1024).score_windows(32) for m in (model, other))
    assert meter.tokens == after.tokens == 640 and meter.loss == pytest.approx(before.val_loss, rel=1e-6)
    assert found["loss"] == pytest.approx(after.val_loss, rel=1e-6)
    assert found["gap"] == pytest.approx(after.val_loss - before.val_loss, abs=1e-6)
    assert found["gap_bpb"] == pytest.approx(after.val_bpb - before.val_bpb, abs=1e-6)
    with torch.no_grad():
        p, q = (
            m.logits(tokens[:640].view(20, 32).long()).double().log_softmax(dim=-1) for m in (model, other)
        )
    assert (
        found["kl"] == pytest.approx((p.exp() * (p - q)).sum().item() / 640, rel=1e-3) and found["kl"] > 1e-3
    )


@pytest.mark.parametrize("knob", [1.0, 1.3])
@pytest.mark.parametrize("i", [0, 1])
def test_rounding_to_the_nearest_stores_the_records_integers_or_wider_int6_steps(model, methods, i, knob):
    stored, weights = methods[i].store(knob), model.quantized()
    assert {"qo_bank", "down_bank", "tok_emb", "ve_table"} <= weights.keys()
    for name, w in weights.items():
        quantiles, limit, wider = (
            (Q.CLIP_QUANTILES, 31, knob) if name in model.BANKS else ([0.9999984], 127, 1)
        )
        assert stored[name].dtype == torch.int16 and (knob > 1 or stored[name].abs().max() == limit)
        for j, matrix in enumerate(w.detach().view(-1, *w.shape[-2:])):
            step = (wider * Q.clip_steps(matrix, quantiles, limit)).half()
            expected = (matrix / step.float()).round().clamp(-limit, limit)
            assert torch.equal(stored[name].view(-1, *w.shape[-2:])[j].float(), expected)
            assert torch.equal(stored[name + ".scale"].view(-1, w.size(-2), 1)[j], step)


def test_finer_steps_than_the_records_clip_where_it_clips_and_its_tables_keep_theirs(model, methods):
    method = methods[1]
    coarse, fine, finest = (T.dequantize(method.store(knob)) for knob in (1.0, 0.5, 0.02))
    for name, w in model.quantized().items():
        if name in model.BANKS:
            kept = w.clamp(-31 * method.base[name], 31 * method.base[name])
            assert (fine[name] - kept).abs().mean() < 0.6 * (coarse[name] - kept).abs().mean()
            assert (finest[name] - kept).abs().max() <= 0.0101 * method.base[name].max()
        else:
            assert torch.equal(coarse[name], finest[name])


def test_gptq_is_what_the_exporter_stores(model, methods):
    method = methods[2]
    expected = T.quantize(model.state_dict(), T.scaled(method.base, 2.0), method.factors)
    assert method.name == "gptq+ans" and method.factors.keys() == {"qkv", "out", "up", "down"}
    assert all(torch.equal(t, expected[name]) for name, t in method.store(2.0).items())


def test_sizes_are_real_and_never_above_the_records(methods, points):
    targets = {}
    for row in points:
        if row["method"] == "rtn+lzma":
            target = targets[row["knob"]] = row["bytes"]
        elif "kl_ratio" in row:
            assert 0.998 * target <= row["bytes"] <= target
    assert targets.keys() == {1.0, 4.0} and len(points) > 6
    for row in points:
        if row["method"] != "rtn+lzma":
            (method,) = (m for m in methods if m.name == row["method"])
            assert len(T.pack_artifact(method.s, "f" * 64, method.store(row["knob"]))) == row["bytes"]


def test_a_size_out_of_reach_is_left_out(methods, meter, monkeypatch):
    monkeypatch.setattr(Q, "TRIES", 2)
    assert methods[2].fit(10) is None
    monkeypatch.setattr(methods[0], "sizes", {})
    monkeypatch.setattr(
        methods[0], "store", lambda knob: methods[0].sizes.update({knob: 10}) or methods[0].weights
    )
    assert [row["method"] for row in Q.curves(methods, [1.0], meter)] == ["rtn+lzma"]


def test_gptq_loses_less_and_saves_bytes(points):
    for row in points:
        if row["method"] == "gptq+ans" and "kl_ratio" in row:
            assert 0 < row["kl_ratio"] < 0.5
        if row["method"] == "rtn+lzma":
            assert row["kl_ratio"] == 1 and 0.1 < row["saved_at_kl"] < 0.9


@pytest.mark.parametrize(
    "values, value, expected",
    [
        ([1, 4, 16], 2, 250),
        ([1, 4, 16], 8, 150),
        ([1, 4, 16], 0.5, None),
        ([1, 4, 16], 20, None),
        ([2, 1, 16], 4, 150),
        ([1, 4, 2], 3, None),
        ([-1, 4, 16], 2, None),
    ],
)
def test_bytes_are_read_off_between_two_points_or_not_at_all(values, value, expected):
    rows = [{"bytes": size, "kl": kl} for size, kl in zip((300, 200, 100), values, strict=False)]
    assert Q.bytes_at(value, "kl", rows[::-1]) == (expected and pytest.approx(expected))


# The program, on what train_gpt.py left


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tiny.make_data(folder)
    environment = tiny.environment({"TTT_ENABLED": 0, "OMP_NUM_THREADS": 1})
    command = ["-m", "tools.measure.keep_weights", "made.pt"]
    (result,) = tiny.finish([Process(command, folder, environment)], 120)
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def program(folder, monkeypatch, capsys):
    """Runs the program with arguments in the folder, without settings of a model; returns (error, output,
    JSON).
    """

    def run(*arguments, **values):
        places = {name: tiny.SETTINGS[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
        for name in T.FIELDS:
            monkeypatch.delenv(name, raising=False)
        for name, value in (places | values).items():
            monkeypatch.setenv(name, str(value))
        with chdir(folder):
            try:
                Q.main([*arguments, "--json", "report.json"])
            except SystemExit as e:
                out, err = capsys.readouterr()
                assert e.code == 2 and err.count("\n") == 1
                return err.strip(), out, None
            return None, capsys.readouterr().out, json.loads((folder / "report.json").read_text())

    return run


@pytest.fixture(scope="module")
def artifact(folder):
    """(its bytes, those of the code, what it stores)."""
    data = (folder / "logs/tiny.bin").read_bytes()
    return (data, len(data) - T.side_bytes(data), T.unpack_artifact(data, "tiny.bin").stored)


def test_the_matrices_of_an_artifact_add_up_to_its_code(program, artifact):
    error, out, found = program("logs/tiny.bin")
    assert error is None and found.keys() == {"matrices"}
    *rows, total = found["matrices"]
    _, code, stored = artifact
    assert sum(row["rows"] * row["columns"] * row["bits"] for row in rows) / 8 == pytest.approx(
        code, rel=0.01
    )
    assert total["bits"] * total["columns"] / 8 == pytest.approx(code, rel=0.01)
    assert total["columns"] == sum(q.numel() for q in stored.values() if q.dtype == torch.int16)
    names = {f"{name}[{i}]" for name in ("qo_bank", "kv_bank") for i in range(4)}
    names |= {f"{name}[{i}]" for name in ("up_bank", "down_bank") for i in range(2)} | {
        "tok_emb",
        "bigram_table",
    }
    assert names <= {row["matrix"] for row in rows} and all(name in out for name in names)
    assert all(row["error"] is None and row["rise"] is None and row["sensitivity"] >= 0 for row in rows)
    assert total["sensitivity"] > 0


def test_the_matrices_of_a_checkpoint_are_those_of_the_artifact_made_of_it(program, folder, artifact):
    error, out, found = program("made.pt", "--knobs", "1", "--tokens", "640")
    assert error is None
    rows, stored = found["matrices"][:-1], artifact[2]
    made, rounded = torch.load(folder / "made.pt", weights_only=True), T.dequantize(stored)
    weights, s = (
        made["weights"],
        T.parse_settings({name.upper(): text for name, text in made["settings"].items()}),
    )
    expected = {row["matrix"]: row for row in program("logs/tiny.bin")[2]["matrices"]}
    for row in rows:
        for key in ("rows", "columns", "step", "bits", "entropy"):
            assert row[key] == pytest.approx(expected[row["matrix"]][key], rel=1e-6)
    q, w, near = (t["up_bank"][1] for t in (stored, weights, rounded))
    (row,) = (row for row in rows if row["matrix"] == "up_bank[1]")
    shares = [count / q.numel() for count in q.unique(return_counts=True)[1].tolist()]
    assert row["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-6)
    assert (
        row["error"] == pytest.approx(((near - w).norm() / w.norm()).item(), rel=1e-4) and row["error"] > 1e-3
    )
    model = T.GPT(s)
    model.load_state_dict(weights)
    holdout = T.read_stream(T.open_shards(folder / "data", "train"), 0, s.calibration_tokens + 1)
    fisher = T.calibrate(model, T.check_ids(holdout, tiny.VOCAB_SIZE, ""), s.train_seq_len)[1]["up_bank"][1]
    assert row["sensitivity"] == pytest.approx(fisher.mean().item(), rel=1e-4)
    assert row["rise"] == pytest.approx((fisher * (near - w) ** 2).sum().item() / 2, rel=1e-4)
    assert found["tokens"] == 640 and [row["method"] for row in found["points"][:3]] == [*Q.METHODS]
    assert all(f"{row['bytes']:,}" in out and f"{row['kl']:.6f}" in out for row in found["points"])


def test_only_a_drawing_needs_matplotlib(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Q, "TRIES", 1)
    assert program("made.pt", "--knobs", "2", "--tokens", "64")[0] is None
    assert "needs matplotlib" in program("made.pt", "--png", "curve.png")[0]


def test_the_curves_are_drawn(program, folder):
    pytest.importorskip("matplotlib")
    assert program("made.pt", "--knobs", "1", "2", "--tokens", "64", "--png", "curve.png")[0] is None
    assert (folder / "curve.png").read_bytes().startswith(PNG)


BAD = {
    "is not there": ("nothing.pt", {}, "nothing.pt"),
    "is a folder": ("data", {}, "data"),
    "is a text": ("text.pt", {}, "neither an artifact nor a checkpoint"),
    "is a shard": ("data/fineweb_val_000000.bin", {}, "neither an artifact nor a checkpoint"),
    "holds other things": ("other.pt", {}, "neither an artifact nor a checkpoint"),
    "lacks a setting": ("less.pt", {}, "other settings"),
    "would run code": ("evil.pt", {}, "neither an artifact nor a checkpoint"),
    "is a cut artifact": ("cut.bin", {}, "truncated"),
    "has too few weights": ("few.pt", {}, "not the tensors of its settings"),
    "is of another model": ("made.pt", {"NUM_LAYERS": 3}, "NUM_LAYERS=3, but the artifact has 2"),
    "is of another tokenizer": ("made.pt", {"TOKENIZER_PATH": "other.model"}, "another tokenizer"),
    "lacks its shards": ("made.pt", {"DATA_PATH": "nowhere"}, "nowhere has no readable fineweb_train_*.bin"),
    "lacks its tokenizer": ("logs/tiny.bin", {"TOKENIZER_PATH": "nowhere"}, "is no SentencePiece model"),
    "has a mistyped setting": ("made.pt", {"EVAL_SEQ_LENGTH": 3}, "EVAL_SEQ_LENGTH is no setting"),
    "has few tokens": (("made.pt", "--tokens", "63"), {}, "two windows of EVAL_SEQ_LEN=32"),
    "has a knob of 0": (("made.pt", "--knobs", "1", "0"), {}, "from 1 to 64"),
    "has no curve": (("logs/tiny.bin", "--png", "x.png"), {}, "is an artifact"),
    "draws to no folder": (("made.pt", "--png", "nowhere/x.png"), {}, "there is no folder nowhere"),
}


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture(scope="module")
def bad_files(folder, artifact):
    good = torch.load(folder / "made.pt", weights_only=True)
    (folder / "text.pt").write_text("no model")
    (folder / "cut.bin").write_bytes(artifact[0][:-5])
    torch.save([1, 2], folder / "other.pt")
    torch.save(
        good | {"settings": {k: v for k, v in good["settings"].items() if k != "seed"}}, folder / "less.pt"
    )
    torch.save(good | {"weights": Evil()}, folder / "evil.pt")
    torch.save(
        good | {"weights": {k: w for k, w in good["weights"].items() if k != "tok_emb"}}, folder / "few.pt"
    )
    tiny.train_tokenizer(folder / "other.model", character_coverage=0.99)


@pytest.mark.parametrize("case", BAD)
def test_input_that(case, program, bad_files):
    arguments, values, expected = BAD[case]
    error, out, _ = program(*([arguments] if isinstance(arguments, str) else arguments), **values)
    assert error.startswith("error: ") and expected in error and len(error) < 400 and out == ""


def test_the_exit_status_of_an_error_is_2(tmp_path):
    (result,) = tiny.finish(
        [Process(["-m", "tools.measure.quant_report", "nothing.pt"], tmp_path, tiny.environment({}))], 60
    )
    assert (
        result.status == 2
        and result.out == ""
        and result.err.startswith("error: ")
        and result.err.count("\n") == 1
    )
