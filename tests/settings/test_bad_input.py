"""Whatever is wrong with a run's input is one line on every rank and an exit status, early, and never a
traceback or a hang."""

import hashlib
import io
import json
import lzma
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import train_gpt as T
from tests import tiny

ARTIFACT = Path("logs/tiny.bin")
EVAL_ONLY = dict(EVAL_ONLY=1, ARTIFACT_PATH=ARTIFACT, RUN_ID="again")
ARTIFACTS_OWN = {
    name: None for name in tiny.SETTINGS if name not in ("DATA_PATH", "TOKENIZER_PATH", "RUN_ID")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny data and what a run on it leaves; the run's result."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.make_data(folder)
    result = tiny.run(folder)
    assert result.status == 0 and (folder / ARTIFACT).exists()
    return folder, result


@pytest.fixture
def scored(tmp_path, trained):
    """A folder with data and an artifact, to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture
def folder(scored):
    """A folder with data alone, to spoil."""
    shutil.rmtree(scored / "logs")
    return scored


def message_of(result, who=""):
    """The message of a failed run, which is all that train_gpt.py says on stderr; warnings of libraries
    are not its own."""
    assert result.status != 0
    assert 'train_gpt.py", line' not in result.err
    (line,) = (line for line in result.err.splitlines() if line.startswith("train_gpt.py: "))
    assert line.startswith(f"train_gpt.py: {who}error: ")
    return line.split("error: ", 1)[1]


def error_of(folder, *, steps=0, **settings):
    """The message with which a run in this process fails after so many steps, without an artifact."""
    artifact, before = folder / ARTIFACT, os.path.exists(folder / ARTIFACT)
    result = tiny.run(folder, **settings)
    assert result.err.count("\n") == 1 and result.out.count("train_loss") == steps
    assert artifact.exists() == before
    return message_of(result)


def errors_of(folder, world_size=2, **settings):
    """The message with which each rank fails, all ending by themselves; it is the same."""
    results = tiny.run_ranks(folder, world_size, **settings)
    (message,) = {message_of(result, f"rank {rank}: ") for rank, result in enumerate(results)}
    assert not (folder / ARTIFACT).exists()
    return message


def spoil(path, position, value):
    """Change one token of a shard."""
    tokens = T.Shard(path).read().tolist()
    tokens[position] = value
    tiny.write_shard(path, tokens)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


TRAIN, LAST, VAL = (
    Path("data") / f"fineweb_{name}.bin" for name in ("train_000000", "train_000001", "val_000000")
)
TOKENIZER = Path("tokenizer.model")


GET_DATA = ["`make demo`", "`python -m tools.data.fineweb`"]


@pytest.mark.parametrize(
    "action, parts",
    [
        (lambda: shutil.rmtree("data"), ["DATA_PATH=data", "fineweb_val_*.bin", *GET_DATA]),
        (VAL.unlink, ["DATA_PATH=data", "fineweb_val_*.bin", *GET_DATA]),
        (lambda: (TRAIN.unlink(), LAST.unlink()), ["DATA_PATH=data", "fineweb_train_*.bin", *GET_DATA]),
        (lambda: tiny.write_shard(TRAIN, range(99), magic=1), [f"shard {TRAIN}: "]),
        (lambda: tiny.write_shard(VAL, range(99), version=2), [f"shard {VAL}: "]),
        (lambda: cut(LAST, 7000), [f"shard {LAST}: "]),
        (lambda: cut(LAST, 0), [f"shard {LAST}: "]),
        (lambda: tiny.write_shard(VAL, []), [f"shard {VAL}: "]),
        (lambda: spoil(TRAIN, 0, 65535), ["first train shard", "token id 65535 ", "VOCAB_SIZE=512"]),
        (lambda: spoil(TRAIN, 255, 600), ["first train shard", "token id 600 ", "VOCAB_SIZE=512"]),
        (lambda: spoil(VAL, 1499, 512), ["validation", "token id 512 ", "VOCAB_SIZE=512"]),
        (lambda: tiny.write_shard(VAL, range(32)), ["validation", "32 tokens", "EVAL_SEQ_LEN=32"]),
        (TOKENIZER.unlink, ["TOKENIZER_PATH=tokenizer.model", *GET_DATA]),
        (lambda: TOKENIZER.write_text("garbage"), ["TOKENIZER_PATH=tokenizer.model", *GET_DATA]),
        (
            lambda: tiny.train_tokenizer(TOKENIZER, vocab_size=500),
            ["TOKENIZER_PATH=tokenizer.model", "500", "VOCAB_SIZE=512"],
        ),
        (lambda: Path("logs").write_text("a file"), ["'logs'"]),
    ],
)
def test_bad_files_stop_a_run_before_it_trains(folder, monkeypatch, action, parts):
    monkeypatch.chdir(folder)
    action()
    message = error_of(folder)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("settings", [dict(DOCUMENT_ATTENTION=1), dict(SMEAR="token")], ids=str)
def test_documents_that_another_token_begins_are_an_error(folder, settings):
    tiny.train_tokenizer(folder / TOKENIZER, bos_id=2, eos_id=1)
    message = error_of(folder, **settings)
    assert message == f"TOKENIZER_PATH={TOKENIZER}: documents must begin with BOS 1"


def test_a_bad_id_further_on_names_its_span(folder):
    spoil(folder / TRAIN, 8 * 65 + 3 * 65 + 64, 512)  # the last target of the second step's fourth span
    message = error_of(folder, steps=1)
    assert "span 11: " in message and "token id 512 " in message


@pytest.mark.parametrize(
    "change, said",
    [(lambda path: os.utime(path, (0, 0)), "was changed during the run"), (Path.unlink, "No such file")],
    ids=["changed", "gone"],
)
def test_a_shard_that_changes_under_the_run_is_named(folder, monkeypatch, change, said):
    """By the program alone, whose hooks do nothing else here."""

    class Change(T.Hooks):
        def on_step(self, trainer, last):
            if trainer.done == 0:
                change(folder / TRAIN)

    monkeypatch.setattr(T, "load_hooks", lambda s: Change())
    message = message_of(tiny.run(folder))
    assert TRAIN.name in message and said in message and not (folder / ARTIFACT).exists()


@pytest.mark.parametrize(
    "settings, parts",
    [
        (dict(NUM_LAYER=3), ["NUM_LAYER ", "NUM_LAYERS"]),
        (dict(TTT_LRR=3), ["TTT_LRR ", "the nearest is TTT_LR"]),
        (dict(SWA_ENABLED=0), ["SWA_ENABLED='0'", "only 1 is left of it"]),
        (dict(LOOP_LAYERS="1-2"), ["LOOP_LAYERS=1,2", "NUM_LAYERS=2"]),
        (dict(PARALLEL_FROM=2), ["PARALLEL_FROM=2", "NUM_LAYERS=2"]),
        (dict(TRAIN_SEQ_SCHEDULE="16@0"), ["TRAIN_SEQ_SCHEDULE=16@0", "DOCUMENT_ATTENTION=0"]),
        (dict(NUM_LAYERS="two"), ["NUM_LAYERS='two'", "integer"]),
        (dict(BETA2=2), ["BETA2='2'", "0.999999"]),
        (dict(EVAL_MODE="windows"), ["EVAL_MODE='windows'", "sliding or streaming"]),
        (dict(TRAIN_BATCH_TOKENS=500), ["TRAIN_BATCH_TOKENS=500", "TRAIN_SEQ_LEN=32"]),
        (dict(MODEL_DIM=34), ["MODEL_DIM=34", "NUM_HEADS=2"]),
        (dict(NUM_HEADS=3), ["MODEL_DIM=32", "NUM_HEADS=3"]),
        (dict(ROPE_DIMS=18), ["ROPE_DIMS=18", "MODEL_DIM=32", "NUM_HEADS=2"]),
        (dict(VE_LAYERS=2), ["VE_LAYERS=2", "NUM_LAYERS=2"]),
        (dict(EVAL_STRIDE=33), ["EVAL_STRIDE=33", "EVAL_SEQ_LEN=32"]),
        (dict(SEED=2**64), [f"SEED='{2**64}'"]),
        (dict(EVAL_ONLY=1), ["EVAL_ONLY=1", "ARTIFACT_PATH="]),
        (dict(WORLD_SIZE=3), ["3", "1, 2, 4 or 8"]),
    ],
    ids=str,
)
def test_bad_settings_stop_a_run_before_it_leaves_anything(folder, settings, parts):
    before = sorted(folder.iterdir())
    message = error_of(folder, **settings)
    assert [part for part in parts if part not in message] == [] and sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "path, culprit",
    [
        ("tokenizer.model/a.bin", "tokenizer.model"),
        ("/dev/null/a.bin", "/dev/null"),
        ("data", "data"),
        (".", "."),
    ],
)
def test_an_artifact_that_cannot_be_written_is_an_error_before_training(folder, path, culprit):
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert culprit in error_of(folder, ARTIFACT_PATH=path)
    assert files.items() <= {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}.items()


def test_an_artifact_may_go_to_a_new_folder(folder):
    result = tiny.run(folder, ARTIFACT_PATH="new/folder/a.bin")
    assert (
        result.status == 0
        and result.err == ""
        and T.unpack_artifact((folder / "new/folder/a.bin").read_bytes(), "a.bin")
    )


@pytest.mark.parametrize(
    "settings, step",
    [
        (dict(MATRIX_LR=1e30), 2),
        (dict(SCALAR_LR=1e30), 2),
        (dict(TIED_EMBED_LR=1e30), 2),
        (dict(TIED_EMBED_INIT_STD=1e30), 1),
    ],
    ids=str,
)
def test_a_loss_that_is_no_number_names_the_step(folder, settings, step):
    message = error_of(folder, steps=step - 1, **settings)
    assert re.match(f"step {step}: loss .*nan.*; lower the learning rates$", message)


def test_weights_that_the_last_step_ruined_are_not_exported(folder):
    assert "no validation loss is finite" in error_of(folder, steps=1, ITERATIONS=1, MATRIX_LR=1e30)


def test_a_run_that_fails_leaves_nothing_but_its_log_and_its_events(folder):
    message = error_of(folder, steps=1, MATRIX_LR=1e30)
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["tiny.jsonl", "tiny.txt"]
    last = json.loads((folder / "logs/tiny.jsonl").read_text().splitlines()[-1])
    assert last == dict(event="error", time=last["time"], message=message)


def test_scoring_an_artifact_again_leaves_nothing_but_its_log_and_its_events(scored):
    before = {path.relative_to(scored) for path in scored.rglob("*")}
    assert tiny.run(scored, **EVAL_ONLY).status == 0
    left = {Path("logs/again.eval.txt"), Path("logs/again.eval.jsonl")}
    assert {path.relative_to(scored) for path in scored.rglob("*")} - before == left


def test_a_run_that_fails_leaves_the_artifact_of_the_one_before(scored):
    before = (scored / ARTIFACT).read_bytes()
    result = tiny.run(scored, MATRIX_LR=1e30)
    assert result.status == 2 and result.out.count("train_loss") == 1
    assert (scored / ARTIFACT).with_suffix(".1.bin").read_bytes() == before


def test_a_submission_over_the_limit_is_scored_and_kept_but_fails(folder):
    result = tiny.run(folder, ARTIFACT_LIMIT=1000)
    size = (folder / ARTIFACT).stat().st_size + tiny.SCRIPT.stat().st_size
    assert message_of(result) == f"submission {size - 1000} bytes over ARTIFACT_LIMIT; {ARTIFACT} is kept"
    assert result.out.splitlines()[-1].startswith("legal_ttt_exact val_loss:")


def test_the_limit_itself_is_allowed(scored):
    size = (scored / ARTIFACT).stat().st_size + tiny.SCRIPT.stat().st_size
    assert tiny.run(scored, **EVAL_ONLY, ARTIFACT_LIMIT=size).status == 0
    assert " 1 bytes over" in message_of(tiny.run(scored, **EVAL_ONLY, ARTIFACT_LIMIT=size - 1))


def test_other_settings_are_judged_beside_those_of_the_artifact(scored, trained):
    result = tiny.run(
        scored, **ARTIFACTS_OWN | EVAL_ONLY | dict(TTT_CHUNK_TOKENS=512)
    )  # less than TRAIN_SEQ_LEN's default
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1] == trained[1].out.splitlines()[-1]


@pytest.mark.parametrize(
    "settings, parts",
    [
        (dict(ARTIFACT_PATH=None), ["EVAL_ONLY=1", "ARTIFACT_PATH="]),
        (dict(ARTIFACT_PATH="none.bin"), ["none.bin"]),
        (dict(ARTIFACT_PATH="data"), ["data"]),
        (dict(NUM_LAYERS=3), ["NUM_LAYERS=3", "artifact has 2"]),
        (dict(XSA_LAST_N=2), ["XSA_LAST_N=2", "artifact has 1"]),
        (dict(VE_LAYERS="0,1"), ["VE_LAYERS=0,1", "artifact has 1"]),
        (dict(VOCAB_SIZE=1024), ["VOCAB_SIZE=1024", "512 tokens"]),
    ],
    ids=str,
)
def test_an_artifact_that_is_not_there_or_not_the_settings_is_an_error(scored, settings, parts):
    message = error_of(scored, **EVAL_ONLY | settings)
    assert [part for part in parts if part not in message] == []


def test_an_artifact_of_another_tokenizer_is_an_error(scored):
    tiny.train_tokenizer(scored / TOKENIZER, model_type="unigram")
    message = error_of(scored, **EVAL_ONLY)
    assert str(ARTIFACT) in message and "another tokenizer" in message and "tokenizer.model" in message


def flip(data, position):
    """The data with one bit changed."""
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:8],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: len(data) // 2],
        lambda data: flip(data, 0),
        lambda data: flip(data, 8),
        lambda data: flip(data, 39),
        lambda data: flip(data, 40),
        lambda data: flip(data, len(data) // 2),
        lambda data: flip(data, -1),
        lambda data: data[::-1],
    ],
)
def test_a_damaged_artifact_is_an_error(scored, change):
    (scored / ARTIFACT).write_bytes(change((scored / ARTIFACT).read_bytes()))
    message = error_of(scored, **EVAL_ONLY)
    assert message.startswith(f"artifact {ARTIFACT}: ") and "truncated" in message


def contents(path):
    """The header and the arrays of an artifact, its code among them."""
    data = path.read_bytes()
    end = 44 + int.from_bytes(data[40:44], "little")
    with np.load(io.BytesIO(lzma.decompress(data[44:end]))) as file:
        arrays = dict(file)
    return json.loads(bytes(arrays.pop("header"))), arrays | dict(code=data[end:])


def seal(header, code=b"", **arrays):
    """An artifact with these contents and a valid checksum."""
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    side = lzma.compress(file.getvalue())
    data = len(side).to_bytes(4, "little") + side + code
    return T.MAGIC + hashlib.sha256(data).digest() + data


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: seal([header], **arrays),
        lambda header, arrays: seal(header | dict(settings=None), **arrays),
        lambda header, arrays: seal(header | dict(settings={}), **arrays),
        lambda header, arrays: seal(
            header | dict(settings={k: v for k, v in header["settings"].items() if k != "num_layers"}),
            **arrays,
        ),
        lambda header, arrays: seal(header),
        lambda header, arrays: seal(header, **arrays, more=np.zeros(3, np.float16)),
        lambda header, arrays: seal(header, **arrays | dict(smear_gate=np.zeros(3, np.float16))),
        lambda header, arrays: seal(header, **arrays | dict(smear_gate=np.array(["text"]))),
        lambda header, arrays: seal(header, **arrays | dict(smear_gate=np.array([Harmful()]))),
        lambda header, arrays: T.MAGIC + hashlib.sha256(b"junk").digest() + b"junk",
    ],
    ids=[
        "list",
        "null",
        "no settings",
        "fewer settings of the model",
        "no tensors",
        "more tensors",
        "shape",
        "type",
        "pickle",
        "no xz",
    ],
)
def test_an_artifact_of_another_version_is_an_error_and_runs_nothing(scored, change):
    (scored / ARTIFACT).write_bytes(change(*contents(scored / ARTIFACT)))
    assert error_of(scored, **ARTIFACTS_OWN | EVAL_ONLY).startswith(f"artifact {ARTIFACT}: ")
    assert not (scored / "harm").exists()


def test_an_intact_artifact_put_together_again_is_scored(scored, trained):
    header, arrays = contents(scored / ARTIFACT)
    (scored / ARTIFACT).write_bytes(seal(header, **arrays))
    assert tiny.run(scored, **EVAL_ONLY).out.splitlines()[-1] == trained[1].out.splitlines()[-1]


@pytest.mark.slow
def test_a_process_of_its_own_says_one_line(folder):
    result = tiny.run_process(folder, EMA_DECY=3)
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert message_of(result) == "EMA_DECY is no setting; the nearest is EMA_DECAY"


@pytest.mark.slow
def test_three_processes_are_refused_by_each(folder):
    assert "1, 2, 4 or 8" in errors_of(folder, world_size=3)


@pytest.mark.slow
def test_a_bad_id_that_rank_1_alone_reads_stops_both_ranks(folder):
    spoil(folder / TRAIN, 8 * 65 + 65, 512)  # the first token of the second step's span 1
    message = errors_of(folder)
    assert "span 9: " in message and "token id 512 " in message


def test_what_rank_0_alone_cannot_write_stops_both_ranks(folder):
    (folder / "logs").write_text("a file")
    assert "'logs'" in errors_of(folder)


def test_a_loss_that_is_no_number_stops_both_ranks(folder):
    assert re.match("step 2: .*nan", errors_of(folder, MATRIX_LR=1e30))


def test_an_artifact_that_rank_0_alone_reads_stops_both_ranks(folder):
    assert "none.bin" in errors_of(folder, **EVAL_ONLY | dict(ARTIFACT_PATH="none.bin"))


@pytest.mark.slow
def test_torchrun_ends_with_the_message(folder):
    shutil.rmtree(folder / "data")
    status, out, err = tiny.run_torchrun(folder, 2)
    lines = re.findall(
        r"^train_gpt\.py: rank [01]: error: (.*)$", err, re.M
    )  # the first rank to end may end the other
    assert status != 0 and 'train_gpt.py", line' not in err
    assert lines and all(line.startswith("DATA_PATH=data ") and "`make demo`" in line for line in lines)


@pytest.mark.slow
def test_settings_of_another_version_are_left_out_and_those_it_lacks_take_their_defaults(tmp_path):
    """Scoring by an artifact whose program had some settings less, or others, and called its recipe best."""
    tiny.make_data(tmp_path)
    assert tiny.run(tmp_path).status == 0
    header, arrays = contents(tmp_path / "logs/tiny.bin")
    assert header["settings"].pop("ttt_grad_clip") == "1"
    assert header["settings"].pop("loop_layers") == "" and header["settings"].pop("smear") == "channel"
    header["settings"] |= dict(recipe="best", ttt_unheard_of="3", swa_every="50")
    (tmp_path / "other.bin").write_bytes(seal(header, **arrays))
    plain, other = (
        tiny.run(tmp_path, EVAL_ONLY=1, RUN_ID="again", ARTIFACT_PATH=path)
        for path in ("logs/tiny.bin", "other.bin")
    )
    assert (plain.status, other.status, plain.err, other.err) == (0, 0, "", "")
    assert other.out.splitlines()[-1] == plain.out.splitlines()[-1]
