"""The artifact gives back what the quantizer made, is as small as entropy allows, lands just under its
limit, and is refused whole when any of it is wrong."""

import hashlib
import io
import json
import lzma
import math
import os
import pickle
from functools import cache
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch

import train_gpt as T
from tests.helpers import factors_of, made_up_tokens, random_batch, random_model, settings

LARGE = dict(MODEL_DIM=288, NUM_LAYERS=2, VE_LAYERS="0", VOCAB_SIZE=512)


class Calibrated:
    """A model, and what the exporter knows of it: the moments of its inputs, the steps `base`, the factors
    for GPTQ."""

    def __init__(self, **extra):
        self.model, self.s = random_model(settings(**extra)), settings()
        self.calibration = T.calibrate(self.model, torch.as_tensor(made_up_tokens(641)).int(), 16)
        self.base = T.base_steps(self.model, self.calibration.fisher)
        self.factors = factors_of(self.calibration.moments)

    @cache  # noqa: B019 (a few models live as long as the tests)
    def quantized(self, knob=1.0):
        """What the exporter would store."""
        return T.quantize(self.model.state_dict(), T.scaled(self.base, knob), self.factors)

    def export(self, limit):
        moments = {name: m.clone() for name, m in self.calibration.moments.items()}
        run = T.Run(self.s, torch.device("cpu"))
        return T.export(run, self.model, "", self.calibration._replace(moments=moments), limit)


@pytest.fixture(scope="module")
def large():
    return Calibrated(**LARGE)


@pytest.fixture(scope="module")
def artifact():
    return T.pack_artifact(settings(), "f" * 64, Calibrated().quantized())


def refused(data):
    try:
        T.unpack_artifact(data, "x.bin")
    except T.RunError as e:
        return "artifact x.bin" in str(e) and "\n" not in str(e)


# Entropy coding


def frequencies(symbols, size):
    counts = np.bincount(symbols, minlength=size)[None]
    return counts[0], T.frequencies(counts)


def test_frequencies_sum_up_however_many_integers_there_are():
    random = np.random.default_rng(0)
    for n, deviation in ((1, 1), (1536, 300), (100_000, 1000), (8191 * 3, 0), (2, 4000)):
        symbols = (
            np.arange(n) % 8191
            if not deviation
            else np.clip(np.rint(random.normal(0, deviation, n)), -4095, 4095).astype(int) + 4095
        )
        counts, frequency = frequencies(symbols, 8191)
        assert frequency.sum() == 2**T.PRECISION and ((frequency[0] > 0) == (counts > 0)).all()
        if n > 10_000:  # in proportion, but for the least ones
            assert np.abs(frequency[0] / 2**T.PRECISION - counts / n).max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [3, 6, 12])
def test_rans_is_within_a_thousandth_of_constriction_and_half_a_percent_of_the_entropy(deviation):
    n, random = 3_000_000, np.random.default_rng(0)
    symbols = np.rint(deviation * random.standard_normal(n)).astype(int) + 80
    counts, frequency = frequencies(symbols, 161)
    code = T.rans_encode(frequency, np.zeros(n, np.uint8), symbols.astype(np.int16))
    p = counts[counts > 0] / n
    coder = constriction.stream.stack.AnsCoder()
    rank = np.cumsum(counts > 0) - 1
    coder.encode_reverse(
        rank[symbols].astype(np.int32), constriction.stream.model.Categorical(p, perfect=False)
    )
    assert len(code) <= 1.001 * 4 * len(coder.get_compressed())
    assert len(code) <= 1.005 * -(p * np.log2(p)).sum() * n / 8
    assert np.array_equal(T.rans_decode(frequency, np.zeros(n, np.uint8), code), symbols)


@pytest.mark.parametrize("n", [1, 2, 7, 4095, 4096, 8192, 12289, 100_001])
def test_rans_gives_back_every_length_and_every_mix_of_contexts(n):
    random = np.random.default_rng(n)
    contexts = random.integers(3, size=n).astype(np.uint8)
    symbols = (random.integers(5, size=n) * (contexts + 1)).astype(
        np.int16
    )  # a context has symbols of its own
    tables = np.concatenate(
        [
            frequencies(symbols[contexts == c] if (contexts == c).any() else np.zeros(1, int), 15)[1]
            for c in range(3)
        ]
    )
    code = T.rans_encode(tables, contexts, symbols)
    assert np.array_equal(T.rans_decode(tables, contexts, code), symbols)
    for wrong in (code[:-2], code + b"\0\0"):
        with pytest.raises(ValueError):
            T.rans_decode(tables, contexts, wrong)


def test_one_certain_symbol_takes_no_bits():
    table = np.zeros((1, 9), np.uint64)
    table[0, 4] = 2**T.PRECISION
    code = T.rans_encode(table, np.zeros(50_000, np.uint8), np.full(50_000, 4, np.int16))
    assert len(code) == 4 * T.lanes_of(50_000)


@pytest.mark.slow
def test_the_estimate_is_what_the_artifact_takes(large):
    for knob in (0.5, 1.0, 4.0, 32.0):
        stored = large.quantized(knob)
        size = len(T.pack_artifact(large.model.s, "f" * 64, stored))
        assert T.estimate_bytes(stored) == pytest.approx(size, rel=0.01, abs=5000)


def test_integers_take_at_most_half_a_percent_more_than_their_matrices_entropy(large):
    stored, bits = large.quantized(), 0
    for q in stored.values():
        for matrix in q.view(-1, *q.shape[-2:]) if q.dtype == torch.int16 else ():
            p = torch.bincount(matrix.flatten() + T.MOST).double() / matrix.numel()
            bits -= matrix.numel() * torch.xlogy(p, p).sum().item() / math.log(2)
    data = T.pack_artifact(large.model.s, "f" * 64, stored)
    assert T.side_bytes(data) == 44 + int.from_bytes(data[40:44], "little")
    assert len(data) - T.side_bytes(data) <= 1.005 * bits / 8


# Packing


def test_the_artifact_gives_back_what_the_quantizer_made():
    calibrated = Calibrated()
    model, stored = calibrated.model, calibrated.quantized()
    fingerprint, kept, found = T.unpack_artifact(T.pack_artifact(model.s, "f" * 64, stored), "x.bin")
    assert fingerprint == "f" * 64
    assert kept == {name: getattr(model.s, name) for name in T.KEPT}
    assert found.keys() == stored.keys()
    for name, t in found.items():
        assert t.dtype == stored[name].dtype and torch.equal(t, stored[name])
    other = T.GPT(model.s)
    other.load_state_dict(T.dequantize(found))
    with torch.no_grad():
        assert (model(*random_batch()) - other(*random_batch())).abs().mean() < 0.1


def test_settings_that_an_artifact_lacks_take_their_defaults_and_others_are_left_out(artifact):
    """As an earlier version made it, with a recipe that is now the record's."""
    (arrays, code), new = parts_of(artifact), ["loop_layers", "train_seq_schedule", "embed_wd", "smear"]
    header = json.loads(bytes(arrays["header"]))
    texts = {name: text for name, text in header["settings"].items() if name not in new}
    header["settings"] = texts | dict(recipe="best", swa_every="50", matrix_step="1")
    side = npz(**arrays | dict(header=np.frombuffer(json.dumps(header).encode(), np.uint8)))
    found = T.unpack_artifact(sealed(lzma.compress(side), code), "x.bin")
    read, stored = T.parse_settings({}, found.settings), T.unpack_artifact(artifact, "x.bin").stored
    assert {name: getattr(read, name) for name in T.KEPT} == {n: getattr(settings(), n) for n in T.KEPT}
    assert all(torch.equal(t, stored[name]) for name, t in found.stored.items())


def test_an_artifact_that_switched_value_embeddings_off_has_none(artifact):
    """As an earlier version said it."""
    arrays, code = parts_of(artifact)
    header = json.loads(bytes(arrays["header"]))
    header["settings"] |= dict(ve_enabled="0", ve_layers="1,2")
    side = npz(**arrays | dict(header=np.frombuffer(json.dumps(header).encode(), np.uint8)))
    assert T.unpack_artifact(sealed(lzma.compress(side), code), "x.bin").settings["ve_layers"] == ()


def test_integers_of_all_sizes_are_kept():
    stored = {
        "a": torch.tensor([[-T.MOST, 0, T.MOST], [0, 0, 0]], dtype=torch.int16),
        "a.scale": torch.ones(2, 1).half(),
        "b": torch.tensor(0.5).half(),
    }
    found = T.unpack_artifact(T.pack_artifact(settings(), "", stored), "x.bin").stored
    assert all(torch.equal(found[name], t) for name, t in stored.items())


@pytest.mark.slow
@pytest.mark.parametrize("mlp_mult, bits", [(1, [5]), (3, [4, 2]), (6, [1])])
def test_the_export_lands_just_under_a_limit_that_binds(mlp_mult, bits):
    """Whatever the model's size: more weights are coarser weights."""
    calibrated = Calibrated(MODEL_DIM=192, NUM_LAYERS=2, VE_LAYERS="0", MLP_MULT=mlp_mult)
    for b in bits:
        limit = b * sum(w.numel() for w in calibrated.model.quantized().values()) // 8 + 10_000
        assert limit - 20_000 < len(calibrated.export(limit)) <= limit


@pytest.mark.slow
def test_the_export_is_no_finer_than_knob_1(large):
    assert large.export(10**8) == T.pack_artifact(large.s, "", large.quantized())


def test_an_export_that_cannot_fit_ends():
    assert len(Calibrated().export(100)) > 100


# Bad artifacts


def test_every_truncation_is_refused(artifact):
    lengths = [*range(60), *range(60, len(artifact))]
    assert all(refused(artifact[:length]) for length in lengths)
    assert refused(artifact + b"\0")


def test_every_altered_byte_is_refused(artifact):
    assert len(artifact) > 2000
    for i in range(len(artifact)):
        altered = bytearray(artifact)
        altered[i] ^= 1 << i % 8
        assert refused(bytes(altered)), i


@pytest.mark.slow
def test_mutations_behind_a_right_checksum_end_in_an_error_or_in_a_model_of_the_right_form(artifact):
    """As a forger would make them: bytes altered, dropped, doubled, in header and code."""
    random, good = np.random.default_rng(0), T.unpack_artifact(artifact, "x.bin").stored
    end, outcomes = 44 + int.from_bytes(artifact[40:44], "little"), []
    for i in range(200):
        body = bytearray(artifact[40:])
        at = (
            random.integers(0, 4)
            if i % 10 == 0
            else random.integers(4, end - 40)
            if i % 2
            else random.integers(end - 40, len(body))
        )
        if i % 3 == 0:
            del body[at : at + random.integers(1, 9)]
        elif i % 3 == 1:
            body[at:at] = body[at : at + 8]
        else:
            body[at] ^= 1 << random.integers(8)
        try:
            found = T.unpack_artifact(with_checksum(bytes(body)), "x.bin").stored
            assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
                n: (t.shape, t.dtype) for n, t in good.items()
            }
        except T.RunError as e:
            assert "artifact x.bin" in str(e) and "\n" not in str(e)
            outcomes.append(i)
    assert len(outcomes) > 190


def with_checksum(packed):
    return T.MAGIC + hashlib.sha256(packed).digest() + packed


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def parts_of(artifact):
    """The arrays of the .npz file, and the code."""
    end = 44 + int.from_bytes(artifact[40:44], "little")
    with np.load(io.BytesIO(lzma.decompress(artifact[44:end]))) as file:
        return dict(file), artifact[end:]


def sealed(side, code=b""):
    return with_checksum(len(side).to_bytes(4, "little") + side + code)


def test_nothing_in_an_artifact_is_executed(artifact, tmp_path):
    evil, (arrays, code) = Evil(tmp_path / "executed"), parts_of(artifact)
    loaders = [lambda data: np.load(io.BytesIO(data), allow_pickle=True)["smear_gate"], pickle.loads]
    for data, loader in zip(
        (npz(**arrays | dict(smear_gate=np.array([evil]))), pickle.dumps(evil)), loaders, strict=True
    ):
        assert refused(sealed(lzma.compress(data), code))
        assert not (tmp_path / "executed").exists()
        loader(data)  # it would have worked
        (tmp_path / "executed").rmdir()


def test_other_formats_with_a_right_checksum_are_refused(artifact):
    arrays, code = parts_of(artifact)
    good, header, numbers = npz(**arrays), arrays["header"], np.zeros(3, np.int8)
    less = {name: a for name, a in arrays.items() if name != "qo_bank.rows"}
    assert not refused(sealed(lzma.compress(good), code))
    for side in (
        b"",
        good,
        artifact[44:200],
        *(
            lzma.compress(data)
            for data in (
                b"",
                b"nothing",
                good[:-100],
                good[:200],
                npz(),
                npz(header=numbers),
                npz(header=header),
                npz(**less),
                *(
                    npz(header=np.frombuffer(text, np.uint8))
                    for text in (
                        b"[1]",
                        b'{"settings": 3}',
                        b'{"tokenizer": "", "settings": {"ve_layers": []}}',
                    )
                ),
                *(
                    npz(**arrays | change)
                    for change in (
                        dict(smear_gate=np.array(["text"])),
                        {"qo_bank.rows": arrays["qo_bank.rows"] + 40},
                        {"qo_bank.rows": arrays["qo_bank.rows"][:-1]},
                        dict(frequency=2 * arrays["frequency"]),
                        dict(frequency=arrays["frequency"][:, 1:]),
                    )
                ),
            )
        ),
    ):
        assert refused(sealed(side, code)), side[:80]
    for other in (b"", code[:-2], code + b"\0\0", code[2:]):
        assert refused(sealed(lzma.compress(good), other))
    assert refused(with_checksum(b"")) and refused(with_checksum(artifact[40:43]))


# Writing


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.bin"
    for data in (b"old", b"new"):
        T.write_atomically(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("owner, name", [(Path, "write_bytes"), (os, "replace")])
def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, owner, name):
    def fail(*args):
        if owner is Path:
            args[0].touch()  # half written
        raise OSError("disk full")

    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(owner, name, fail)
        T.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_artifact_of_an_earlier_version_scores_as_it_did():
    """It was made by a recipe that is gone; the loss is what that version gave."""
    path = Path(__file__).with_name("record_of_before.bin")
    artifact = T.unpack_artifact(path.read_bytes(), path)
    s = T.parse_settings({}, artifact.settings)
    assert (s.recipe, s.eval_mode, s.loop_layers) == ("record", "streaming", ())
    model = T.GPT(s)
    model.load_state_dict(T.dequantize(artifact.stored))
    tokens = (torch.arange(97) * 37 % 512)[None]
    with torch.no_grad():
        nats = model(tokens[:, :-1], tokens[:, 1:]).double().sum().item()
    assert nats == pytest.approx(639.3409304618835, rel=1e-6)
