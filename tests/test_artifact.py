"""The artifact gives back what the quantizer made, fits its limit, and is refused whole when any of it is wrong."""
import hashlib
import io
import lzma
import os
import pickle
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as T
from helpers import random_batch, random_model, settings

LARGE = dict(MODEL_DIM=288, NUM_LAYERS=1, VE_LAYERS=0, VOCAB_SIZE=512)  # banks and tables on both sides of T.SMALL


@pytest.fixture(params=["tiny", "large"])
def model(request, monkeypatch):
    """A tiny model whose matrices all count as large, and one with large and small ones as they are."""
    if request.param == "tiny":
        monkeypatch.setattr(T, "SMALL", 0)
    return random_model(settings(**({} if request.param == "tiny" else LARGE)))


@pytest.fixture(scope="module")
def artifact():
    return T.pack_artifact(settings(), "f" * 64, T.quantize(random_model(settings()).state_dict(), T.TINY))


def refused(data):
    try:
        T.unpack_artifact(data, "x.bin")
    except T.RunError as e:
        return "artifact x.bin" in str(e) and "\n" not in str(e)


# Quantization

def test_row_quantiles_are_torchs():
    generator = torch.Generator().manual_seed(0)
    for columns in [*range(1, 40), 512, 999, 1000, 1001, 1002, 1536, 2001, 10001, 100001]:
        a = torch.rand(3, columns, generator=generator)
        for quantiles in ((0.999, 0.9995, 0.9999, 0.99999, 1.0), (0.9999984,)):
            for quantile, clip in zip(quantiles, T.row_quantiles(a, quantiles), strict=True):
                assert torch.equal(clip, torch.quantile(a, quantile, dim=-1, keepdim=True)), (columns, quantile)


def bank_with_outliers():
    """(6, 5, 3000): rows of all sizes, matrices with ever fewer and larger outliers."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(6, 5, 3000, generator=generator) * torch.logspace(-3, 1, 5)[:, None]
    rare = torch.tensor([1, 20, 50, 100, 200, 400])[:, None, None]
    return bank * (1 + 4 * torch.rand(bank.shape, generator=generator) ** rare)


def test_int6_takes_the_clip_quantile_of_least_error_for_each_matrix():
    bank = bank_with_outliers()
    scales, chosen = T.int6_scales(bank), set()
    for matrix, scale in zip(bank, scales):
        errors, options = [], []
        for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1):
            clip = torch.quantile(matrix.abs(), quantile, dim=-1, keepdim=True)
            options.append((clip / 31).half().float())
            q = (matrix / options[-1]).round().clamp(-31, 31)
            errors.append(((q * options[-1] - matrix) ** 2).mean().item())
        best = errors.index(min(errors))
        chosen.add(best)
        assert torch.equal(scale, options[best])
    assert len(chosen) > 1


def test_the_first_of_equal_clip_quantiles_wins(monkeypatch):
    bank = torch.tensor([[[0, 31, 31 * (1 + 2 ** -10)]]])  # either clip moves one entry by 31 / 1024
    for quantiles, scale in (((0.5, 1.0), 1), ((1.0, 0.5), 1 + 2 ** -10)):
        monkeypatch.setattr(T, "CLIP_QUANTILES", quantiles)
        assert T.int6_scales(bank).item() == scale


def test_the_order_of_the_clip_quantiles_matters_for_equals_alone(monkeypatch):
    bank, scales = bank_with_outliers(), []
    for quantiles in permutations((0.999, 0.9999, 1.0)):
        monkeypatch.setattr(T, "CLIP_QUANTILES", quantiles)
        scales.append(T.int6_scales(bank))
    assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_the_scale_floor_only_touches_rows_of_small_weights():
    bank = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0], [0.01], [100]])
    free, floored = T.int6_scales(bank).flatten(), T.int6_scales(bank, floor=1 / 31).flatten()
    assert free[0] == T.TINY and free[1] < 0.002
    assert floored[:2].tolist() == [torch.tensor(1 / 31).half().item()] * 2
    assert floored[2] == free[2]
    assert T.fake_quantize(bank, T.int6_scales(bank))[0, 0].tolist() == [0] * 64


def test_int6_and_int8_stay_in_their_range(model):
    weights = model.state_dict()
    stored = T.quantize(weights, T.TINY)
    for name, q in stored.items():
        if name + ".scale" in stored:
            limit, scale = 31 if name in T.GPT.BANKS else 127, stored[name + ".scale"]
            assert q.dtype == torch.int8 and scale.dtype == torch.float16
            assert scale.shape == (*q.shape[:-1], 1)  # one a row
            assert q.abs().max() == limit
            inside = q.abs() < limit
            error = (q.float() * scale.float() - weights[name]).abs()
            assert (error <= (0.5 + 0.07) * scale.float())[inside].all()  # 0.07: 127 fp16 scales are not exact
        else:
            assert q.dtype == torch.float16
    assert {"tok_emb.scale", "up_bank.scale"} <= set(stored)
    assert not {"smear_gate.scale", "ve_scale.scale"} & set(stored)


# Packing

def test_the_artifact_gives_back_what_the_quantizer_made(model):
    stored = T.quantize(model.state_dict(), 0.001)
    fingerprint, kept, weights = T.unpack_artifact(T.pack_artifact(model.s, "f" * 64, stored), "x.bin")
    assert fingerprint == "f" * 64
    assert kept == {name: getattr(model.s, name) for name in T.NAMES if name not in T.LOCAL_SETTINGS}
    expected = T.dequantize(stored)
    assert list(weights) == list(expected) == list(model.state_dict())
    for name, w in weights.items():
        assert w.dtype == torch.float32 and torch.equal(w, expected[name])
    for name, bank, scale in zip(model.BANKS, model.banks(), T.bank_scales(model, 0.001)):
        assert torch.equal(T.fake_quantize(bank, scale), weights[name])


def test_the_artifact_is_the_model_that_late_qat_trains(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in model.BANKS:  # only the banks are rounded in training
                p.copy_(T.dequantize(T.quantize({name: p}, T.TINY))[name])
        stored = T.quantize({name: p for name, p in model.state_dict().items() if name in model.BANKS}, T.TINY)
        stored |= {name: p for name, p in model.state_dict().items() if name not in model.BANKS}
        other = T.GPT(model.s)
        other.load_state_dict(T.unpack_artifact(T.pack_artifact(model.s, "", stored), "x.bin")[2])
        assert torch.equal(model(*random_batch(), T.bank_scales(model, T.TINY)), other(*random_batch()))


@pytest.fixture(scope="module")
def uneven():
    """A model with rows of all sizes, up to twice as large, and the bytes of its artifact."""
    model, generator = random_model(settings(**LARGE)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bank in model.banks():
            bank *= 2 * torch.rand(*bank.shape[:2], 1, generator=generator)
    return model, len(T.pack_artifact(model.s, "", T.quantize(model.state_dict(), T.TINY)))


def test_the_scale_floor_makes_the_artifact_fit(uneven):
    model, free = uneven
    weights = model.state_dict()
    assert T.fit_scale_floor(weights, int(1.07 * free)) == T.TINY
    floors = [T.fit_scale_floor(weights, int(part * free)) for part in (0.95, 0.8)]
    assert T.TINY < floors[0] < floors[1]
    for part, floor in zip((0.95, 0.8), floors):
        size = len(T.pack_artifact(model.s, "", T.quantize(weights, floor)))
        assert 0.9 * part * free < size <= part * free  # and no coarser than needed
    assert T.fit_scale_floor(weights, 1000) == T.TINY  # none would do


def test_an_artifact_that_came_out_too_large_is_made_again(uneven, monkeypatch):
    model, free = uneven
    monkeypatch.setattr(T, "fit_scale_floor", lambda weights, limit: 0.017)  # 0.82 of it
    data = T.export(model.s, "", SimpleNamespace(model=model, floor=T.TINY), int(0.8 * free))
    assert 0.78 * free < len(data) <= int(0.8 * free)


# Bad artifacts

def test_every_truncation_is_refused(artifact):
    lengths = [*range(60), *range(60, len(artifact), 997), len(artifact) - 1]
    assert all(refused(artifact[:length]) for length in lengths)
    assert refused(artifact + b"\0")


def test_every_altered_byte_is_refused(artifact):
    for i in [*range(60), *range(60, len(artifact), 997), len(artifact) - 1]:
        altered = bytearray(artifact)
        altered[i] ^= 1 << i % 8
        assert refused(bytes(altered)), i


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


def header_of(artifact):
    return np.load(io.BytesIO(lzma.decompress(artifact[40:])))["header"]


def test_nothing_in_an_artifact_is_executed(artifact, tmp_path):
    evil, header = Evil(tmp_path / "executed"), header_of(artifact)
    loaders = [lambda data: np.load(io.BytesIO(data), allow_pickle=True)["tok_emb"], pickle.loads]
    for data, loader in zip((npz(header=header, tok_emb=np.array([evil])), pickle.dumps(evil)), loaders):
        assert refused(with_checksum(lzma.compress(data)))
        assert not (tmp_path / "executed").exists()
        loader(data)  # it would have worked
        (tmp_path / "executed").rmdir()


def test_other_formats_with_a_right_checksum_are_refused(artifact):
    content = lzma.decompress(artifact[40:])
    good, numbers = np.load(io.BytesIO(content))["header"], np.zeros(3, np.int8)
    assert not refused(with_checksum(lzma.compress(npz(header=good))))
    for packed in (b"", content, artifact[40:-9], *(lzma.compress(data) for data in (
            b"", b"nothing", content[:-100], content[:200], npz(), npz(tok_emb=numbers), npz(header=numbers),
            *(npz(header=np.frombuffer(text, np.uint8)) for text in (
                b"[1]", b'{"settings": 3}', b'{"tokenizer": "", "settings": {"ve_layers": []}}')),
            npz(header=good, tok_emb=np.array(["text"])), npz(header=good, **{"a": numbers, "a.scale": np.zeros(2)})))):
        assert refused(with_checksum(packed))


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
