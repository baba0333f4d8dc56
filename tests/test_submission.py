"""tools/runlog.py and tools/submission.py: what a log says of its run, and submission.json from it."""
import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
import submission
import train_gpt
from make_shards import write_shards
from runlog import Stage, parse_log, read_log
from train_gpt import FIELDS, RunError, show

SOURCE = Path(train_gpt.__file__).read_text("utf-8")
CHANGED = dict(RUN_ID="sketch", SEED="7", NUM_LAYERS="4", VE_LAYERS="2,3", TRAIN_BATCH_TOKENS="4096", EVAL_STRIDE="32",
               DATA_PATH="/a folder/shards", ARTIFACT_PATH="/a folder/sketch.bin")
PRINTED = """\
8 x NVIDIA H100 80GB HBM3, attention: FlashAttention 3, torch 2.9.1+cu128, Python 3.12.3
3327044 parameters; tokens: 120001 for validation, 3967231 for training, 32769 held out
warm-up took 24.2s; 10337ms are kept for average and calibration
step:0/20000 val_loss:6.9310 val_bpb:3.8816 train_time:0ms step_avg:0.00ms
step:10/20000 train_loss:6.8938 train_time:7661ms step_avg:766.09ms
progress: training 72%, 8 s left
late QAT from step 36, 1.000 times the record's steps
step:40/20000 val_loss:5.5553 val_bpb:3.1111 train_time:20000ms step_avg:500.00ms
weight_average:raw holdout_loss:5.558981
weight_average:ema holdout_loss:5.510468
weight_average:swa holdout_loss:5.597565
weight_average chosen:ema
training: 40 steps in 20000ms, 38106ms with average and calibration; peak memory 687 MiB
averaged eval_time:5000ms, peak memory 687 MiB
averaged_exact val_loss:5.50527908 val_bpb:3.08305629
quantized by gptq in 1.5s, 1.000 times the record's steps
Total submission size int+rans: 2923801 bytes
compiled scoring and TTT in 61.3s
final_int6_roundtrip eval_time:7853ms, peak memory 1687 MiB
final_int6_roundtrip_exact val_loss:5.51504779 val_bpb:3.08852676
final_int6_sliding_window eval_time:29142ms, peak memory 1702 MiB
final_int6_sliding_window_exact val_loss:5.49760670 val_bpb:3.07875962
ttt_chunk [1/2] bpb=2.902560 time=2.8s
ttt_chunk [2/2] bpb=3.070921 time=75.5s
legal_ttt eval_time:75456ms, peak memory 2687 MiB
legal_ttt_exact val_loss:5.48361088 val_bpb:3.07092080
"""


def make_log(printed: str = PRINTED, source: str = SOURCE, **changed: str) -> str:
    """A log as train_gpt.py writes it."""
    values = {name: show(f.default) for name, f in FIELDS.items()} | CHANGED | changed
    settings = " ".join(f"{name}={value}" for name, value in values.items())
    return f"{source}\n{'=' * 100}\nsettings: {settings}\n{printed}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with logs/sketch.txt."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("logs/sketch.txt").write_text(make_log(), "utf-8")
    return tmp_path


def run(*arguments: str) -> dict:
    submission.main(["logs/sketch.txt", "--data", "a sketch", *arguments])
    return json.loads(Path("submission.json").read_text("utf-8"))


def fails(*arguments: str) -> str:
    """The error that submission.py ends with; nothing may be written."""
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as failure:
        submission.main(list(arguments))
    assert isinstance(failure.value.code, str) and "\n" not in failure.value.code
    assert set(Path().rglob("*")) == before
    return failure.value.code


def test_each_figure_is_read_from_its_line():
    log = parse_log(make_log(), "sketch")
    assert log.source == SOURCE and log.bytes_code == len(SOURCE.encode())
    assert log.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert (log.hardware, log.attention) == ("8 x NVIDIA H100 80GB HBM3", "FlashAttention 3")
    assert (log.torch, log.python) == ("2.9.1+cu128", "3.12.3")
    assert (log.parameters, log.steps, log.bytes_total) == (3327044, 40, 2923801)
    assert log.holdout_losses == dict(raw=5.558981, ema=5.510468, swa=5.597565) and log.chosen == "ema"
    assert log.stages == dict(
        training=Stage(5.5553, 3.1111, 20.0, 687), averaged=Stage(5.50527908, 3.08305629, 18.106, 687),
        roundtrip=Stage(5.51504779, 3.08852676, 7.853, 1687), sliding=Stage(5.4976067, 3.07875962, 29.142, 1702),
        ttt=Stage(5.48361088, 3.0709208, 75.456, 2687))
    assert log.final == log.stages["ttt"]


def test_changed_settings_are_those_that_differ_from_the_logged_sources_defaults():
    assert parse_log(make_log(), "sketch").changed_settings == CHANGED
    other = SOURCE.replace("seed=(1337,", "seed=(7,")
    changed = parse_log(make_log(source=other), "sketch").changed_settings
    assert changed == {name: value for name, value in CHANGED.items() if name != "SEED"}
    with pytest.raises(RunError, match="run sketch: the source in its log is no train_gpt.py"):
        parse_log(make_log(source="no Python!"), "sketch").changed_settings


def test_without_ttt_the_sliding_score_is_the_last():
    log = parse_log(make_log(PRINTED[:PRINTED.index("ttt_chunk")], TTT_ENABLED="0"), "sketch")
    assert log.final.val_bpb == 3.07875962 and "ttt" not in log.stages


def test_a_log_cut_after_any_line_is_refused():
    text = make_log()
    parse_log(text, "sketch")
    for end in [i for i, character in enumerate(text) if character == "\n"][SOURCE.count("\n"):-1]:
        with pytest.raises(RunError, match="^sketch: "):
            parse_log(text[:end], "sketch")
    with pytest.raises(RunError, match="no legal_ttt_exact line"):
        parse_log(text[:text.rindex("legal_ttt_exact")], "sketch")


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(RunError, match="no legal_ttt_exact line"):
        parse_log(make_log(PRINTED.replace("val_bpb:3.07092080", "val_bpb:nan")), "sketch")


def test_what_a_run_writes_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [f"{i} squared is {i * i}, and {i} doubled is {2 * i}." for i in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix="tokenizer", model_type="bpe", vocab_size=288, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
    tokens = {split: write_shards(texts, tokenizer, tmp_path, split)
              for split, texts in (("val", documents[:20]), ("train", documents[20:]))}
    monkeypatch.setattr(train_gpt, "log_file", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = dict(
        DATA_PATH=".", TOKENIZER_PATH="tokenizer.model", VOCAB_SIZE="288", RUN_ID="tiny", ITERATIONS="3", WARMUP_STEPS="0",
        TRAIN_BATCH_TOKENS="256", TRAIN_SEQ_LEN="32", VAL_BATCH_SIZE="2048", HOLDOUT_TOKENS="64", NUM_LAYERS="1",
        MODEL_DIM="16", NUM_HEADS="2", NUM_KV_HEADS="1", ROPE_DIMS="4", XSA_LAST_N="0", BIGRAM_VOCAB_SIZE="0",
        VE_ENABLED="0", EVAL_SEQ_LEN="32", EVAL_STRIDE="16", TTT_CHUNK_TOKENS="128", TTT_EPOCHS="1")
    train_gpt.run(train_gpt.parse_settings(settings))
    train_gpt.log_file.close()
    log = read_log(Path("logs/tiny.txt"))
    assert log.source == SOURCE and log.steps == 3 and log.chosen in log.holdout_losses
    assert log.changed_settings == settings | dict(VE_LAYERS="")
    assert list(log.stages) == ["training", "averaged", "roundtrip", "sliding", "ttt"]
    assert log.bytes_total == log.bytes_code + Path("logs/tiny.bin").stat().st_size
    size = sum(map(len, documents[:20]))
    for stage in log.stages.values():  # nats per token and bits per byte of the same text
        assert stage.val_bpb == pytest.approx(stage.val_loss / 0.6931472 * (tokens["val"] - 1) / size, abs=1e-3)


def test_submission_holds_the_logs_figures(folder, capsys):
    result = run("--author", "Ada", "--github-id", "ada", "--name", "A sketch", "--blurb", "Small.", "--date", "2025-03-01")
    assert result == dict(
        name="A sketch", author="Ada", github_id="ada", blurb="Small.", date="2025-03-01", track="non_record_16mb",
        val_loss=5.48361088, val_bpb=3.0709208, bytes_total=2923801, bytes_code=len(SOURCE.encode()),
        hardware="8 x NVIDIA H100 80GB HBM3", data="a sketch",
        versions=dict(torch="2.9.1+cu128", python="3.12.3", attention="FlashAttention 3"), seed=7,
        settings=dict(SEED="7", NUM_LAYERS="4", VE_LAYERS="2,3", TRAIN_BATCH_TOKENS="4096", EVAL_STRIDE="32"),
        steps=40, train_seconds=20.0, eval_seconds=112.451, log="logs/sketch.txt",
        source_sha256=hashlib.sha256(SOURCE.encode()).hexdigest(), source_is_present_train_gpt=True)
    assert capsys.readouterr().out == "wrote submission.json: val_bpb 3.0709, 2,923,801 bytes\n"
    assert Path("submission.json").read_text("utf-8").startswith('{\n  "name": "A sketch",\n')
    assert Path("submission.json").read_text("utf-8").endswith("\n}\n")


def test_what_is_not_given_has_a_default(folder):
    result = run()
    assert result["name"] == "train_gpt.py, run sketch" and result["author"] == result["github_id"] == ""
    assert result["blurb"] == ("40 steps of 4096 tokens, weight average ema, weights quantized by gptq and entropy-coded, "
                               "score-first test-time training")


def test_the_log_is_named_from_the_folder_of_the_submission(folder):
    submission.main(["logs/sketch.txt", "--data", "a sketch", "--out", "results/one/submission.json"])
    assert json.loads(Path("results/one/submission.json").read_text())["log"] == "../../logs/sketch.txt"


def test_a_log_of_another_source_is_told(folder, capsys):
    Path("logs/sketch.txt").write_text(make_log(source=SOURCE + "# older\n"))
    result = run()
    assert not result["source_is_present_train_gpt"] and result["bytes_code"] == len(SOURCE.encode()) + 8
    assert "another version of train_gpt.py" in capsys.readouterr().out


def test_a_second_submission_replaces_the_first_and_leaves_no_other_file(folder):
    run("--name", "first")
    assert run("--name", "second")["name"] == "second"
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "submission.json"]


def test_a_failed_write_keeps_the_old_file(folder, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    run("--name", "first")
    old = Path("submission.json").read_text()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(SystemExit, match="disk full"):
        run("--name", "second")
    assert Path("submission.json").read_text() == old
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "submission.json"]


@pytest.mark.parametrize("text, told", [
    (make_log(PRINTED[:PRINTED.index("legal_ttt eval_time")]), "the run did not finish"),
    (make_log(EVAL_ONLY="1"), "EVAL_ONLY=1; give the log of the run that trained"),
    (make_log(PRINTED.replace("2923801", "16000001")), "1 over the limit of 16000000"),
    ("# notes\n", "no log of train_gpt.py"),
    ("", "no log of train_gpt.py"),
    (b"\xff\xfe", "no UTF-8 text"),
    (None, "cannot be read (No such file or directory)"),
])
def test_what_cannot_be_submitted_ends_in_one_line(folder, text, told):
    Path("logs/other.txt").write_bytes(text if isinstance(text, bytes) else (text or "").encode())
    if text is None:
        Path("logs/other.txt").unlink()
    error = fails("logs/other.txt", "--data", "a sketch")
    assert error.startswith("error: logs/other.txt: ") and told in error


def test_a_bad_date_and_empty_data_are_refused(folder):
    assert "YYYY-MM-DD" in fails("logs/sketch.txt", "--data", "a sketch", "--date", "yesterday")
    assert "--data is empty" in fails("logs/sketch.txt", "--data", " ")
