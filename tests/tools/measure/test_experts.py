"""tools/measure/experts.py: experts alone, kept, and mixed."""

import json
import math
from contextlib import chdir

import pytest
import torch

import train_gpt as T
from tests import tiny
from tests.commands import fails
from tools.measure import experts

pytestmark = pytest.mark.slow
EXPERTS = "lr=0;lr=0.02;lr=0.05,chunk=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny run with these experts."""
    folder = tmp_path_factory.mktemp("experts")
    tiny.make_data(folder)
    result = tiny.run(folder, EVAL_MODE="streaming", TTT_CHUNK_TOKENS=256, TTT_EXPERTS=EXPERTS)
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    for name in T.FIELDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZER_PATH", "tokenizer.model")
    with chdir(folder):
        yield folder


WHAT = ["logs/tiny.bin", "data/fineweb_val_000000.bin"]


def test_experts_and_their_mixture_score_as_in_a_run(here, monkeypatch, capsys):
    """And what has read is not run again."""
    arguments = [
        *WHAT,
        "--experts",
        EXPERTS,
        "--keep",
        "kept",
        "--json",
        "found.json",
        "--mix",
        "0,1,2",
        "--mix",
        "1",
    ]
    experts.main(arguments)
    found, events = json.loads((here / "found.json").read_text()), (here / "logs/tiny.jsonl").read_text()
    logged = [event for event in map(json.loads, events.splitlines()) if event["event"] == "expert"]
    assert (
        [one["expert"] for one in found["experts"]] == [one["expert"] for one in logged] == EXPERTS.split(";")
    )
    for one, other in zip(found["experts"], logged, strict=True):
        assert one["bpb"] == pytest.approx(other["bpb"], rel=1e-6)
        assert len(other["weights"]) == 50
    assert all(
        sum(part) == pytest.approx(1) for part in zip(*(one["weights"] for one in logged), strict=True)
    )
    final = json.loads(next(line for line in reversed(events.splitlines()) if '"legal_ttt"' in line))
    whole, alone = found["mixtures"]
    assert whole["bpb"] == pytest.approx(final["val_bpb"], rel=1e-6)
    assert alone["bpb"] == pytest.approx(found["experts"][1]["bpb"], rel=1e-6)
    assert "| 0,1,2      |   0.2 |       100 |" in capsys.readouterr().out
    monkeypatch.setattr(experts, "read_alone", None)
    experts.main(arguments)
    assert json.loads((here / "found.json").read_text()) == found


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([*WHAT, "--experts", "lr=0", "--mix", "0,1"], "--mix: 1 is no number of an expert"),
        ([*WHAT, "--experts", "rate=0"], "TTT_EXPERTS: 'rate' is none of"),
        ([*WHAT, "--experts", "lr=0", "--json", "none/x.json"], "there is no folder none"),
        (["none.bin", WHAT[1], "--experts", "lr=0"], "none.bin: No such file"),
    ],
)
def test_bad_arguments_are_told_in_one_line(here, arguments, said):
    assert said in fails(experts.main, *arguments)


def naive_cache(tokens, vocab_size, length, t):
    """The distribution (V,) over the token behind position t, by counting."""
    document = [i for i in range(t + 1) if tokens[: i + 1].count(T.BOS) == tokens[: t + 1].count(T.BOS)]
    p = [1 / vocab_size] * vocab_size
    for k in range(length + 1):
        same = [
            i for i in document[:-1] if [0, *tokens][i + 2 - k : i + 2] == [0, *tokens][t + 2 - k : t + 2]
        ]
        followed = [tokens[i + 1] for i in same]
        p = [(followed.count(y) + p[y]) / (len(followed) + 1) for y in range(vocab_size)]
    return p


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_cache_is_a_distribution_by_what_the_document_has_shown(length):
    """Of no token but those before, and of no other document."""
    tokens = [1, 3, 4, 3, 4, 5, 3, 4, 3, 4, 1, 3, 4, 5, 3, 4, 1, 1, 2, 3, 4, 3]
    losses = experts.cache_losses(torch.tensor(tokens), 6, length)
    assert losses.shape == (len(tokens) - 1,)
    for t, loss in enumerate(losses.tolist()):
        p = naive_cache(tokens, 6, length, t)
        assert sum(p) == pytest.approx(1) and p[tokens[t + 1]] == pytest.approx(math.exp(-loss))
    changed = experts.cache_losses(torch.tensor([*tokens[:12], 0, *tokens[13:]]), 6, length)
    assert torch.equal(changed[:11], losses[:11]) and not torch.equal(changed[11:], losses[11:])


def test_a_cache_is_mixed_like_an_expert(here, capsys):
    experts.main([*WHAT, "--experts", "lr=0", "--cache", "0", "2", "--mix", "0,2", "--json", "found.json"])
    found = json.loads((here / "found.json").read_text())
    assert [one["expert"] for one in found["experts"]] == ["lr=0", "cache of 0 tokens", "cache of 2 tokens"]
    assert found["mixtures"][0]["bpb"] < found["experts"][0]["bpb"]
    assert "--mix: 3 is no number" in fails(
        experts.main, *WHAT, "--experts", "lr=0", "--cache", "0", "2", "--mix", "3"
    )
