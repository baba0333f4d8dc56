"""The audit names each way to break the rules of scoring, finds nothing in the program, and changes no score."""

import json
import os
import socket
from contextlib import chdir
from pathlib import Path

import audit
import pytest
import tiny
import torch
import torch.nn.functional as F
import train_gpt as T

CPU, ARTIFACT = torch.device("cpu"), Path("logs/tiny.bin")
SETTINGS = tiny.SETTINGS | dict(TTT_LR=0.02, TTT_CHUNK_TOKENS=256, TTT_EPOCHS=2, TTT_ENTROPY_ADAPT=0)
SLIDING, STREAMING = dict(TTT_ENABLED=0), dict(EVAL_MODE="streaming", TTT_ENABLED=0)
WINDOWS, STREAM = dict(TTT_MUON=1), dict(EVAL_MODE="streaming", TTT_MUON=1)  # with TTT
MODES = {
    "sliding": SLIDING,
    "streaming": STREAMING,
    "windows, Muon": WINDOWS,
    "windows, SGD": WINDOWS | dict(TTT_MUON=0),
    "stream, Muon": STREAM,
    "stream, SGD": STREAM | dict(TTT_MUON=0, TTT_FREEZE_BLOCKS=1),
}


def texts(settings):
    """SETTINGS and others, as in the environment."""
    return {name: str(value) for name, value in (SETTINGS | settings).items()}


def make_artifact(path, seed):
    """An artifact of a random model, for the data above it."""
    s = T.parse_settings(texts({}))
    generator, model = torch.Generator().manual_seed(seed), T.GPT(s)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.dim() > 1 else 0.5, p.size(-1) ** -0.5 if p.dim() else 0.1, generator=generator)
    steps = {
        name: w.detach().abs().amax(-1, keepdim=True).div(31).half().float()
        for name, w in model.quantized().items()
    }
    fingerprint = T.load_tokenizer(path.parents[1] / "tokenizer.model", tiny.VOCAB_SIZE)[1]
    path.write_bytes(T.pack_artifact(s, fingerprint, T.quantize(model.state_dict(), steps)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tokenizer.model, shards in data/, a run's artifact and room for its audit in logs/."""
    folder = tmp_path_factory.mktemp("audit")
    tiny.make_data(folder)
    (folder / "logs").mkdir()
    make_artifact(folder / "logs/tiny.bin", seed=0)
    return folder


@pytest.fixture
def audited(folder, monkeypatch):
    """audited(**settings) -> what the audit of the artifact finds. The working folder is the data's."""
    monkeypatch.chdir(folder)
    return lambda **settings: audit.audit_artifact(T, ARTIFACT, texts(settings), CPU)


def score(settings, audited, done={}, first=""):
    """(each stage's score, what the last one left of the weights, what the audit found), scored as a run does; of a resumed run
    the stages before `first` are done."""
    _, kept, stored = T.unpack_artifact(ARTIFACT.read_bytes(), ARTIFACT)
    s = T.parse_settings(texts(settings), kept)
    tokenizer, _ = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
    tokens, model, scores = T.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len), T.GPT(s), {}
    model.load_state_dict(T.dequantize(stored))
    check = audit.Audit(T, s, "scoring" * bool(first))
    if audited:
        check.begin(ARTIFACT, tokenizer)
    for name, stage in T.scoring_stages(s, model, tokens, T.byte_tables(tokenizer), lambda: 0.0).items():
        first = first if name != first else ""
        scores[name] = done[name] if first else stage()
        check.stage(name, scores[name])
    return scores, [w.detach().clone() for w in model.parameters()], check.end() if audited else None


@pytest.fixture(scope="module", params=MODES)
def clean(folder, request):
    """(settings, score() without an audit, score() with one)."""
    with chdir(folder):
        plain = score(MODES[request.param], audited=False)
        return MODES[request.param], plain, score(MODES[request.param], audited=True)


def test_the_program_keeps_the_rules_and_each_check_is_made_in_each_stage(clean):
    settings, _, (scores, _, found) = clean
    assert found["violations"] == found["failed"] == []
    assert [*found["stages"]] == [*scores]
    for name, stage in found["stages"].items():
        made = stage["checks"]
        assert made["positions"] == stage["tokens"] == 1499
        assert min(made[check] for check in ("reads", "sums", "weights", "order", "totals", "bytes")) > 0
        assert (made.get("chunks", 0) > 0) == (name == "legal_ttt") == ("chunks" in stage)


def test_scores_and_weights_are_bitwise_those_without_an_audit(clean):
    _, (plain, weights, _), (scores, audited_weights, found) = clean
    assert scores == plain
    assert all(torch.equal(w, v) for w, v in zip(weights, audited_weights, strict=True))
    for name, stage in found["stages"].items():
        assert (stage["val_loss"], stage["val_bpb"]) == (plain[name].val_loss, plain[name].val_bpb)


def test_the_log_of_chunks_is_in_order(clean):
    settings, _, (*_, found) = clean
    edges = [0, 32, *range(288, 1499, 256), 1499] if "EVAL_MODE" in settings else [*range(0, 1499, 256), 1499]
    for chunks in (stage["chunks"] for stage in found["stages"].values() if "chunks" in stage):
        numbers, indices, scored, learnt, epochs = map(list, zip(*chunks))
        assert numbers == sorted({*numbers}) and indices == [*range(len(edges) - 1)]
        assert scored == [[low, high] for low, high in zip(edges, edges[1:])]
        assert epochs == [0 if high in (32, 1499) else 2 for _, high in scored]
        assert learnt == [span if e else None for span, e in zip(scored, epochs)]


@pytest.mark.parametrize(
    "settings",
    [dict(EVAL_STRIDE=64, TTT_ENABLED=0), dict(EVAL_MODE="streaming", TTT_CHUNK_TOKENS=64)],
    ids=["sliding", "streaming"],
)
def test_windows_of_more_than_1024_tokens_are_audited_as_they_are(audited, settings):
    """There the rotary base depends on the length of what is read at once."""
    found = audited(EVAL_SEQ_LEN=1280, **settings)
    assert found["violations"] == found["failed"] == []
    assert all(stage["checks"]["sums"] for stage in found["stages"].values())


def test_nothing_of_the_program_stays_changed(folder, audited):
    places = [
        (T.Scorer, "read"),
        (T.Scorer, "measure"),
        (T.Learner, "learn"),
        (T.Learner, "update"),
        (T, "windowed_chunks"),
        (T, "streamed_chunks"),
        (T, "score_first_ttt"),
    ]
    before = [getattr(owner, name) for owner, name in places]
    audited(**SLIDING)
    assert [getattr(owner, name) for owner, name in places] == before
    assert audit.opened is None


@pytest.mark.parametrize("settings", [WINDOWS, STREAM], ids=["windows", "stream"])
def test_a_run_that_goes_on_in_ttt_is_audited_from_there(folder, monkeypatch, settings):
    """As tools/checkpoint.py has it go on: with the first three chunks' records, weights and past."""
    monkeypatch.chdir(folder)
    kept = {}

    def keep(what, *args):
        if what == "chunk" and len(args[1]) == 3:
            learner, records = args
            kept.update(weights=T.copies(learner.weights), past=list(learner.past), records=list(records))

    def resume(what, *args):
        if what == "resume_ttt":
            T.copy_weights(args[0].weights, kept["weights"])
            args[0].past = kept["past"]
            return list(kept["records"])

    monkeypatch.setattr(T, "notify", keep)
    whole, *_ = score(settings, audited=False)
    monkeypatch.setattr(T, "notify", resume)
    scores, _, found = score(settings, audited=True, done=whole, first="legal_ttt")
    assert found["violations"] == []
    assert scores == whole
    ttt = found["stages"].pop("legal_ttt")
    assert ttt["checks"]["positions"] == sum(high - low for _, _, (low, high), *_ in ttt["chunks"]) < 1000
    assert [chunk for _, chunk, *_ in ttt["chunks"]][0] == 3
    assert not any("checks" in stage for stage in found["stages"].values())


# Each way to break a rule. A plant is given the function that it replaces.


def ahead(n):
    def plant(embed):
        def peeking(self, tokens):
            x = embed(self, tokens)
            return x + F.pad(x, (0, 0, -n, n))

        return peeking

    return T.GPT, "embed", plant


def reads_the_target(read):
    def peeking(self, at, matrices, past, ranks=1):
        x = self.ids(torch.cat((at[:, :1] - 2, at[:, :1] - 1, at), dim=1) + 1 if past else at + 1)
        return self.model(x, self.ids(at + 1), matrices, past, ranks)

    return peeking


def unnormalised(forward):
    return lambda self, *args: forward(self, *args) - 0.01


def no_spaces(byte_tables):
    def tables(tokenizer):
        found = byte_tables(tokenizer)
        return found._replace(has_leading_space=torch.zeros_like(found.has_leading_space))

    return tables


def reads_a_training_shard(score_all):
    def read_and_score(self, *args):
        T.open_shard("data/fineweb_train_000000.bin")
        return score_all(self, *args)

    return read_and_score


def changes_weights_unseen(score_all):
    def changed(self, *args):
        self.model.tok_emb.data.mul_(1.01)
        return score_all(self, *args)

    return changed


def changes_weights(streamed_chunks):
    def chunks(scorer, learner, s, first=0):
        for chunk in streamed_chunks(scorer, learner, s, first):
            yield chunk
            T.copy_weights(learner.weights, [w * 1.01 for w in learner.weights])

    return chunks


def learns_by_hand_before_it_scores(streamed_chunks):
    """Nothing but what is scored shows it: the weights are as they were before the score is given."""

    def chunks(scorer, learner, s, first=0):
        C, read = s.ttt_chunk_tokens, type(scorer).read
        for c, (_, learn) in enumerate(streamed_chunks(scorer, learner, s, first), first):
            at = torch.arange(C if c else scorer.window)[None] + (scorer.window + (c - 1) * C if c else 0)
            weights, before = learner.weights, T.copies(learner.weights)
            grads = torch.autograd.grad(read(scorer, at, learner.model.matrices(), None).mean(), weights)
            for w, grad in zip(weights, grads):
                w.data.sub_(grad, alpha=0.1)
            with torch.no_grad():
                nll = read(scorer, at, learner.model.matrices(), None)
            for w, b in zip(weights, before):
                w.data.copy_(b)
            yield scorer.measure(nll, at, 0, scorer.targets), None

    return chunks


def learns_before_it_scores(windowed_chunks):
    def chunks(scorer, learner, s, first=0):
        C = s.ttt_chunk_tokens
        for c in range(first, -(-scorer.targets // C)):
            learner.learn(scorer.tokens[c * C : (c + 1) * C + 1], 1, s.ttt_lr)
            score, _ = next(windowed_chunks(scorer, learner, s, c))
            yield score, None

    return chunks


def learns_from_other_text(windowed_chunks):
    def chunks(scorer, learner, s, first=0):
        for score, _ in windowed_chunks(scorer, learner, s, first):
            yield score, lambda epochs: learner.learn(torch.arange(65).int(), epochs, s.ttt_lr)

    return chunks


def learns_too_far(windowed_chunks):
    def chunks(scorer, learner, s, first=0):
        for c, (score, learn) in enumerate(windowed_chunks(scorer, learner, s, first)):
            yield (
                score,
                lambda epochs: learner.learn(scorer.tokens[c * 256 + 1 : c * 256 + 514], epochs, s.ttt_lr),
            )

    return chunks


PLANTS = {
    "peek one token ahead": (ahead(1), SLIDING, "sums", "a score is not that of its context alone"),
    "peek two tokens ahead": (ahead(2), STREAMING, "reads", "a later token was read"),
    "read the target itself": (
        (T.Scorer, "read", reads_the_target),
        SLIDING,
        "sums",
        "a target was read before it was scored",
    ),
    "mix without a norm": (
        (T.GPT, "forward", unnormalised),
        STREAMING,
        "sums",
        "probabilities do not sum to 1",
    ),
    "mix without a norm, in TTT": (
        (T.GPT, "forward", unnormalised),
        STREAM,
        "sums",
        "legal_ttt: probabilities do not sum to 1",
    ),
    "score twice": (
        (T, "plan_windows", lambda plan: lambda *args: torch.cat((plan(*args), plan(*args)[-1:]))),
        SLIDING,
        "positions",
        "scored twice: 11 positions, the first is 1488",
    ),
    "skip the tail": (
        (T, "plan_windows", lambda plan: lambda *args: plan(*args)[:-1]),
        SLIDING,
        "positions",
        "never scored: 11 positions, the first is 1488",
    ),
    "cut the text": (
        (T, "validation_tokens", lambda read: lambda *args: read(*args)[:-100]),
        SLIDING,
        "positions",
        "other text than the validation shards'",
    ),
    "count no leading spaces": (
        (T, "byte_tables", no_spaces),
        SLIDING,
        "bytes",
        "a document's bytes are not those of its text",
    ),
    "report a lower score": (
        (T, "score_of", lambda of: lambda sums: of(sums * torch.tensor([0.99, 1, 1]))),
        SLIDING,
        "totals",
        "nats of the score are not those recorded",
    ),
    "report more bytes": (
        (T, "score_of", lambda of: lambda sums: of(sums + torch.tensor([0, 0, 9]))),
        SLIDING,
        "bytes",
        "other bytes than the whole text's",
    ),
    "read a training shard": (
        (T.Scorer, "score_all", reads_a_training_shard),
        SLIDING,
        "files",
        "a file of no use to scoring was opened: ",
    ),
    "change the weights": (
        (T, "streamed_chunks", changes_weights),
        STREAM,
        "weights",
        "the weights changed outside an update",
    ),
    "change the weights unseen": (
        (T.Scorer, "score_all", changes_weights_unseen),
        SLIDING,
        "weights",
        "sliding_window: the stage does not start from the weights of the first one",
    ),
    "learn first": (
        (T, "windowed_chunks", learns_before_it_scores),
        WINDOWS,
        "order",
        "adapted on before it was scored",
    ),
    "learn first, unseen": (
        (T, "streamed_chunks", learns_by_hand_before_it_scores),
        STREAM,
        "chunks",
        "a chunk was scored with knowledge of its future",
    ),
    "learn from other text": (
        (T, "windowed_chunks", learns_from_other_text),
        WINDOWS,
        "order",
        "the weights learn from what is no part of the text that is scored",
    ),
    "learn too far": (
        (T, "windowed_chunks", learns_too_far),
        WINDOWS,
        "order",
        "adapted on before it was scored",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_breaks_a_rule_is_named(audited, monkeypatch, name):
    (owner, attribute, plant), settings, check, words = PLANTS[name]
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    found = audited(**settings)
    assert check in found["failed"]
    assert any(words in line for line in found["violations"]), found["violations"]


# From the artifact alone


@pytest.fixture(scope="module")
def run(folder):
    """The audit of a run of logs/tiny.bin, as it was written."""
    with chdir(folder):
        score(STREAM, audited=True)
    return (folder / "logs/tiny.audit.json").read_text("utf-8")


@pytest.fixture
def offline(folder, run, monkeypatch, capsys):
    """offline(*arguments) -> (exit status, lines of output and of errors) of tools/audit.py."""
    (folder / "logs/tiny.audit.json").write_text(run, "utf-8")
    monkeypatch.chdir(folder)
    for name, value in texts(STREAM).items():
        monkeypatch.setenv(name, value)

    def main(artifact="logs/tiny.bin", *arguments):
        with pytest.raises(SystemExit) as end:
            audit.main([artifact, "data", "--tokenizer", "tokenizer.model", *arguments])
        out, err = capsys.readouterr()
        return int(end.value.code), out.splitlines(), err.splitlines()

    return main


def test_an_artifact_on_its_own_gives_what_the_run_gave(offline):
    status, lines, errors = offline()
    assert (status, errors) == (0, [])
    results = dict(line.split("(")[0].rsplit(maxsplit=1) for line in lines)
    assert results == dict.fromkeys(
        [*audit.CHECKS, "same artifact", "same code", "same scores", "same epochs"], "ok"
    )
    assert any(line.startswith("positions") and "(4,497)" in line for line in lines)


def test_what_differs_from_the_run_is_named(folder, offline):
    path = folder / "logs/tiny.audit.json"
    run = json.loads(path.read_text("utf-8"))
    run["hashes"]["code"] = "0" * 64
    run["stages"]["legal_ttt"]["val_bpb"] -= 2e-5
    run["stages"]["legal_ttt"]["chunks"][3][4] = 1
    path.write_text(json.dumps(run), "utf-8")
    status, lines, _ = offline()
    assert status == 1
    code, bpb, epochs = [line.removeprefix("violation: ") for line in lines if line.startswith("violation: ")]
    assert code.startswith("another code than the run's") and bpb.startswith(
        "legal_ttt: another val_bpb than the run's"
    )
    assert epochs.startswith("legal_ttt: other epochs than the run's: chunk 3 is the first; ")


def test_another_artifact_than_the_runs_is_named(folder, offline):
    make_artifact(folder / "logs/other.bin", seed=1)
    status, lines, _ = offline("logs/other.bin", "--compare", "logs/tiny.audit.json")
    assert status == 1
    assert any("another artifact than the run's" in line for line in lines)
    assert any("legal_ttt: another val_bpb than the run's" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["logs/none.bin"], "logs/none.bin"),
        (["tokenizer.model"], "artifact tokenizer.model: truncated, altered or no artifact"),
        (["logs/tiny.bin", "--compare", "none.json"], "none.json"),
        (["logs/tiny.bin", "--compare", "logs/tiny.bin"], "logs/tiny.bin: no audit of a run"),
        (["logs/tiny.bin", "--compare", "empty.json"], "empty.json: no audit of a run"),
    ],
)
def test_input_that_is_unusable_is_named_in_a_line(folder, offline, arguments, words):
    (folder / "empty.json").write_text("[]", "utf-8")
    status, _, errors = offline(*arguments)
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]


# Two processes


def worker(rank, folder, port):
    """Audit the program and one that learns first; leave what is found in folder/RANK.pt."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    device = T.start_processes()
    found = [audit.audit_artifact(T, ARTIFACT, texts(settings), device) for settings in (WINDOWS, STREAM)]
    T.windowed_chunks = learns_before_it_scores(T.windowed_chunks)
    found.append(audit.audit_artifact(T, ARTIFACT, texts(WINDOWS), device))
    torch.save(found, f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(folder, audited):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(worker, (str(folder), port), nprocs=2)
    one, other = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for found in one + other:
        for own in found["stages"].values():
            own.pop("checks")
    for a, b in zip(one, other):
        assert {**a, "seconds": 0, "share": 0} == {**b, "seconds": 0, "share": 0}
    windows, stream, planted = one
    for settings, found in ((WINDOWS, windows), (STREAM, stream)):
        assert found["violations"] == []
        alone = audited(**settings)
        assert audit.differences(found, alone) == []
        assert [chunk[1:] for chunk in found["stages"]["legal_ttt"]["chunks"]] == [
            chunk[1:] for chunk in alone["stages"]["legal_ttt"]["chunks"]
        ]
    assert any("adapted on before it was scored" in line for line in planted["violations"])
