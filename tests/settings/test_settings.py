"""Settings: the record's defaults, and one clear line for every value, name or combination that cannot be
meant."""

import math
import re

import pytest

import train_gpt as T
from tests import tiny
from tools.common import spelling

RECORD = dict(
    DATA_PATH="./data/datasets/fineweb10B_sp1024",
    TOKENIZER_PATH="./data/tokenizers/fineweb_1024_bpe.model",
    VOCAB_SIZE=1024,
    SEED=1337,
    ITERATIONS=20000,
    MAX_WALLCLOCK_SECONDS=600.0,
    WARMUP_STEPS=20,
    WARMDOWN_ITERS=3500,
    TRAIN_BATCH_TOKENS=786432,
    TRAIN_SEQ_LEN=2048,
    TRAIN_LOG_EVERY=500,
    VAL_LOSS_EVERY=4000,
    VAL_BATCH_SIZE=524288,
    NUM_LAYERS=11,
    MODEL_DIM=512,
    NUM_HEADS=8,
    NUM_KV_HEADS=4,
    MLP_MULT=3.0,
    ROPE_BASE=10000.0,
    ROPE_DIMS=16,
    LOGIT_SOFTCAP=30.0,
    QK_GAIN_INIT=1.5,
    XSA_LAST_N=4,
    BIGRAM_VOCAB_SIZE=1536,
    BIGRAM_DIM=128,
    VE_DIM=128,
    VE_LAYERS=(9, 10),
    TIED_EMBED_INIT_STD=0.005,
    MATRIX_LR=0.025,
    SCALAR_LR=0.025,
    TIED_EMBED_LR=0.035,
    MUON_MOMENTUM=0.99,
    MUON_MOMENTUM_WARMUP_START=0.92,
    MUON_MOMENTUM_WARMUP_STEPS=1500,
    MUON_BACKEND_STEPS=5,
    MUON_WD=0.04,
    ADAM_WD=0.04,
    BETA2=0.95,
    GRAD_CLIP_NORM=0.3,
    EMA_DECAY=0.997,
    EVAL_SEQ_LEN=2048,
    EVAL_STRIDE=64,
    TTT_ENABLED=True,
    TTT_MUON=True,
    TTT_NS_STEPS=3,
    TTT_ENTROPY_ADAPT=True,
    TTT_ENTROPY_HIGH=2.1,
    TTT_ENTROPY_LOW=1.75,
    TTT_LR=0.002,
    TTT_EPOCHS=3,
    TTT_CHUNK_TOKENS=32768,
    TTT_BATCH_SEQS=32,
    TTT_MOMENTUM=0.9,
    TTT_GRAD_CLIP=1.0,
    RECIPE="record",
    EVAL_MODE="sliding",
    WARMDOWN_FRACTION=0.0,
    MIN_LR=0.0,
    TRAIN_SEQ_SCHEDULE=(),
    SMEAR="channel",
    SKIP_GATES=False,
    ATTN_GATE_CHANNELS=0,
    PARALLEL_FROM=-1,
    LOOP_LAYERS=(),
    LOOP_COUNT=0,
    DOCUMENT_ATTENTION=False,
    MUON_ROW_NORM=False,
    NS_COEFFICIENTS="classic",
    EMBED_WD=-1.0,
    TTT_DECAY=0.0,
)
FRONTIER = dict(
    VOCAB_SIZE=8192,
    MLP_MULT=4.0,
    LOOP_LAYERS=(3, 4, 5),
    LOOP_COUNT=2,
    PARALLEL_FROM=8,
    TRAIN_SEQ_SCHEDULE=((1024, 0.0), (2048, 0.1), (3072, 0.7)),
    WARMDOWN_FRACTION=0.85,
    MIN_LR=0.1,
    NS_COEFFICIENTS="polar",
    EMBED_WD=0.085,
    SMEAR="token",
    EVAL_MODE="streaming",
)


def values(environ):
    s = T.parse_settings(environ)
    return {name: getattr(s, name.lower()) for name in T.FIELDS}


def error_of(read=T.parse_settings, **environ):
    """The message that these variables give; it is one line."""
    with pytest.raises(T.RunError) as error:
        read({name: str(value) for name, value in environ.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_are_the_records():
    defaults = values({})
    assert {name: defaults[name] for name in RECORD} == RECORD
    assert {name: type(defaults[name]) for name in RECORD} == {
        name: type(value) for name, value in RECORD.items()
    }
    assert values({"RECIPE": "record"}) == defaults


def test_a_recipe_gives_other_defaults_over_which_settings_hold():
    found, defaults = values({"RECIPE": "frontier"}), values({})
    assert {name: found[name] for name in FRONTIER} == FRONTIER
    changed = {name for name in T.FIELDS if found[name] != defaults[name]}
    assert changed == {"RECIPE", *map(str.upper, T.RECIPES["frontier"])}
    given = dict(RECIPE="frontier", MLP_MULT="3", LOOP_LAYERS="", TRAIN_SEQ_SCHEDULE="")
    assert values(given) == found | dict(MLP_MULT=3.0, LOOP_LAYERS=(), TRAIN_SEQ_SCHEDULE=())


def test_every_setting_is_read_from_the_environment():
    changed = dict(
        DATA_PATH="d",
        TOKENIZER_PATH="t",
        RUN_ID="r",
        ARTIFACT_PATH="a",
        RESUME="c",
        RECIPE="frontier",
        SMEAR="token",
        NS_COEFFICIENTS="polar",
        MUON_BACKEND_STEPS=4,
        LOOP_LAYERS=(1, 2),
        PARALLEL_FROM=7,
        TRAIN_SEQ_SCHEDULE=((32, 0.0), (64, 0.25)),
        EVAL_MODE="streaming",
        TTT_CHUNK_TOKENS=64,
        VE_LAYERS=(0, 2),
        MLP_MULT=2.5,
        MODEL_DIM=96,
        NUM_HEADS=6,
        NUM_KV_HEADS=3,
        ROPE_DIMS=8,
        TRAIN_SEQ_LEN=64,
        TRAIN_BATCH_TOKENS=1024,
        ROPE_BASE=1e6,
    )
    for name, value in values({}).items():
        if name not in changed:
            if isinstance(value, bool):
                changed[name] = not value
            elif name == "TTT_EXPERTS":
                changed[name] = "lr=0;lr=0.02,chunk=32"
            else:
                changed[name] = value + 1 if isinstance(value, int) else value / 2 or 0.5
        assert changed[name] != value
    text = {name: str(int(value) if isinstance(value, bool) else value) for name, value in changed.items()}
    del text["TTT_EXPERTS"], text["TTT_CACHE"]  # nothing learns
    found = values(text | dict(VE_LAYERS="0,2", LOOP_LAYERS="1-2", TRAIN_SEQ_SCHEDULE="32@0,64@0.25"))
    streams = {name: changed.pop(name) for name in ("TTT_EXPERTS", "TTT_CACHE")}
    none = {name: found.pop(name) for name in streams}
    assert found == changed and none == dict(TTT_EXPERTS="", TTT_CACHE=0)
    assert streams.items() <= values(streams | dict(EVAL_MODE="streaming")).items()
    found |= none
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values({}).items()
    }


@pytest.mark.parametrize("text", ["many", " ", "0x10", "1;2", "nan", "-1"])
def test_what_does_not_parse_is_named_with_its_value(text):
    names = [name for name, value in values({}).items() if not isinstance(value, str)]
    assert len(names) > 60
    for name in names:
        if (name, text) not in (("PARALLEL_FROM", "-1"), ("EMBED_WD", "-1")):  # none, ADAM_WD
            assert error_of(**{name: text}).startswith(f"{name}={text!r}: allowed is ")


@pytest.mark.parametrize(
    "name, text, kind, limits",
    [
        ("NUM_LAYERS", "0", "integer", [1]),
        ("NUM_LAYERS", "1.5", "integer", [1]),
        ("ITERATIONS", "-1", "integer", [0]),
        ("ITERATIONS", "1e3", "integer", [0]),
        ("WARMUP_STEPS", "", "integer", [0]),
        ("ROPE_DIMS", "2", "integer", [4]),
        ("VOCAB_SIZE", "65537", "integer", [2, 65536]),
        ("EVAL_STRIDE", "0", "integer", [1]),
        ("TTT_EPOCHS", "0", "integer", [1]),
        ("MATRIX_LR", "-0.1", "number", [0]),
        ("MATRIX_LR", "inf", "number", [0]),
        ("TTT_LR", "1e999", "number", [0]),
        ("MUON_MOMENTUM", "1.01", "number", [0, 1]),
        ("BETA2", "1", "number", [0, 0.999999]),
        ("MLP_MULT", "0", "number", [0.5]),
        ("LOGIT_SOFTCAP", "0", "number", [0.001]),
        ("TTT_MUON", "2", "0 or 1", [0, 1]),
        ("EVAL_ONLY", "true", "0 or 1", [0, 1]),
        ("TTT_MUON", "-1", "0 or 1", [0, 1]),
        ("RECIPE", "best", "record or frontier", []),
        ("EVAL_MODE", "", "sliding or streaming", []),
        ("SMEAR", "tokens", "channel or token", []),
        ("NS_COEFFICIENTS", "5", "classic or polar", []),
        ("VE_LAYERS", "9 10", "comma", [3, 5]),
        ("VE_LAYERS", "1.5", "comma", [3, 5]),
        ("VE_LAYERS", "-1,9", "comma", [3, 5]),
        ("LOOP_LAYERS", "5-3", "integers", [3, 5]),
        ("LOOP_LAYERS", "3-", "integers", [3, 5]),
        ("LOOP_LAYERS", "three", "integers", [3, 5]),
        ("TRAIN_SEQ_SCHEDULE", "1024", "LENGTH@SHARE", []),
        ("TRAIN_SEQ_SCHEDULE", "512@0,1024", "LENGTH@SHARE", []),
        ("TRAIN_SEQ_SCHEDULE", "0@512@1", "LENGTH@SHARE", []),
        ("TRAIN_SEQ_SCHEDULE", "0.5@0", "LENGTH@SHARE", []),
        ("WARMDOWN_FRACTION", "1.1", "number", [0, 1]),
        ("MIN_LR", "2", "number", [0, 1]),
        ("LOOP_FROM", "1.5", "number", [0, 1]),
        ("LOOP_COUNT", "-1", "integer", [0]),
        ("ATTN_GATE_CHANNELS", "-1", "integer", [0]),
        ("ATTN_GATE_SCALE", "-0.5", "number", [0]),
        ("SKIP_GATES", "yes", "0 or 1", [0, 1]),
        ("DOCUMENT_ATTENTION", "2", "0 or 1", [0, 1]),
        ("MUON_ROW_NORM", "on", "0 or 1", [0, 1]),
    ],
)
def test_what_is_allowed_is_said(name, text, kind, limits):
    named, said = error_of(**{name: text}).split(": allowed is ")
    assert named == f"{name}={text!r}" and kind in said
    assert [float(number) for number in re.findall(r"[0-9.]*[0-9]", said)] == limits


def test_a_seed_that_the_generator_cannot_take_is_refused():
    assert error_of(SEED=2**64).startswith(f"SEED='{2**64}': allowed is ")


MISSPELT = """
NUM_LAYRES SEEDS SEDE SEED_ seed NUM_LAYER NUM_LAYERSS NUM_HAEDS NUM_KV_HEAD TTT_LRR TTT_MOUN MUON_WDD
EVAL_STRIDES EVAL_STRID EVAL_SRTIDE WARMDOWN_ITER MODEL_DIMS MODLE_DIM MODEL_DMI MAX_WALLCLOCK_SECOND
MAX_WALCLOCK_SECONDS MAX_WALLCLOCK DATA_PATHS DATAPATH DATA_PAHT ITERATION ITERATONS INTERATIONS ROPE_DIM
EMA_DECAYS SWA_EVERY_N XSA_LAST VE_LAYER BIGRAM_VOCAB TRAIN_SEQ_LENGTH TRAIN_SEQLEN VAL_BATCH
VAL_BATCHSIZE GRAD_CLIP_NORMS GRAD_CLIP ARTIFACT_PATHS RUN_IDS RUNID NUM_KV RECIPIE
RECEIPE AUDT AUDTI RESUM RESUME_ EVALONLY EVAL_ONLLY EVAL_MOD EVAL_MDOE EVAL_MODES CHECKPOINT_EVRY
CHECKPOINTS_EVERY ARTIFACT_LIMITS TOKENISER_PATH TOKENIZER_PAHT VOCABSIZE VOCAB_SIZES BETA_2 BETA
ADAM_WDD MATRIX_RL MATRIX_LRR SCALAR_LRS TIED_EMBED_LRS LOGIT_SOFTCAPS LOGITSOFTCAP QK_GAIN
MLP_MUL MLP_MULTI CALIBRATION_TOKEN TRAIN_BATCH_TOKEN TRAIN_BATCH_TOKNES
TRAIN_LOG_EVRY VAL_LOSS_EVRY WARMUP_STEP WARMPU_STEPS TTT_ENABLE TTT_CHUNK TTT_CHUNKS_TOKENS TTT_EPOCH
TTT_LEARNING_RATE TTT_DECAYS ttt_lr Num_Layers EVAL_MAX_SECOND EVAL_SEQLEN EVAL_SEQ_LENGTH EMA_ENABLE
SWA_DISABLE NUM_HEDS MODEL_DM ITERATIOSN LOOP_LAYER LOOPS_FROM PARALEL_FROM ATTN_GATE_CHANNEL SMEARS
SKIP_GATE DOCUMENT_ATTENTIONS TRAIN_SEQ_SCHED WARMDOWN_FRAC MIN_LRR MUON_ROWNORM NS_COEFICIENTS EMBED_WDD
"""
OTHERS = """
MAX_JOBS MODEL_DIR MODEL_NAME NUM_THREADS NUM_GPUS RUN_NAME DATA_DIR DATA_HOME TOKENIZERS_PARALLELISM
HOME PATH PWD USER LANG TERM SHELL TMPDIR HOSTNAME OMP_NUM_THREADS MKL_NUM_THREADS HEAD_NODE HEAD_NODE_IP
SEED_FILE ARTIFACT_DIR CUDA_VISIBLE_DEVICES NCCL_DEBUG RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
GROUP_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCH_LOGS PYTORCH_CUDA_ALLOC_CONF SLURM_JOB_ID
SLURM_NTASKS WANDB_PROJECT HF_HOME VIRTUAL_ENV PYTHONPATH LD_LIBRARY_PATH PYTEST_CURRENT_TEST
NVIDIA_VISIBLE_DEVICES _ A TOKENIZER_SERVICE_HOST TOKENIZER_SERVICE_PORT TOKENIZER_PORT
TOKENIZER_PORT_80_TCP TOKENIZER_PORT_80_TCP_ADDR TTT_SERVICE_HOST EVAL_SERVICE_HOST EVAL_PORT SEED_PORT
TORCH_COMPILE_DISABLE WANDB_DISABLED WANDB_MODE TRAIN_DIR TRAINING_JOB_NAME SM_MODEL_DIR SM_CHANNEL_TRAIN
NUM_NODES NUM_WORKERS NUM_EPOCHS MAX_STEPS MAX_TOKENS BATCH_SIZE LEARNING_RATE CHECKPOINT_DIR
CHECKPOINT_PATH LOG_LEVEL LOGNAME EDITOR VISUAL PAGER OLDPWD SHLVL MAIL LS_COLORS XDG_RUNTIME_DIR
SSH_CLIENT SSH_TTY DISPLAY CONDA_PREFIX CONDA_DEFAULT_ENV PIP_CACHE_DIR JAVA_HOME KUBERNETES_SERVICE_HOST
KUBERNETES_PORT_443_TCP_PROTO AWS_REGION AWS_BATCH_JOB_ID EVAL_DISABLE DATA_VERSION RUN_MODE JOB_ID
USER_ID NODE_RANK HEAD_IP AUDIO_DRIVER EVALUATION TRACE_ID GIT_SEQUENCE_EDITOR BASE_PATH META_PATH
DATA_ROOT MODEL_PATH RUN_DIR EXPERIMENT_ID ARTIFACTS_DIR VE_ID
"""


@pytest.mark.parametrize("name", MISSPELT.split())
def test_a_misspelt_setting_is_an_error_that_names_one(name):
    message = error_of(spelling.check_names, **{name: 1})
    assert (found := re.fullmatch(rf"{name} is no setting; the nearest is (\w+)", message))
    assert found[1] in T.FIELDS


@pytest.mark.parametrize(
    "name, nearest",
    dict(
        NUM_LAYRES="NUM_LAYERS",
        SEEDS="SEED",
        ttt_lr="TTT_LR",
        TTT_MOUN="TTT_MUON",
        MATRIX_RL="MATRIX_LR",
        XSA_LAST="XSA_LAST_N",
        MAX_WALLCLOCK="MAX_WALLCLOCK_SECONDS",
        NUM_KV="NUM_KV_HEADS",
        RECEIPE="RECIPE",
        TOKENISER_PATH="TOKENIZER_PATH",
        LOOPS_FROM="LOOP_FROM",
        TRAIN_SEQ="TRAIN_SEQ_LEN",
    ).items(),
)
def test_the_nearest_setting_is_named(name, nearest):
    message = error_of(spelling.check_names, **{name: 1})
    assert message == f"{name} is no setting; the nearest is {nearest}"


def test_variables_of_other_programs_are_no_settings():
    spelling.check_names(dict.fromkeys([*OTHERS.split(), *T.FIELDS], "x"))


RETIRED = dict(
    TIE_EMBEDDINGS=1,
    EMBED_LR=0.6,
    HEAD_LR=0.008,
    TTT_FREEZE_BLOCKS=0,
    MICRO_BATCH_TOKENS=0,
    SWA_ENABLED=1,
    SWA_EVERY=50,
    MATRIX_STEP=1,
    LATE_QAT=0,
    LATE_QAT_THRESHOLD=0.15,
    EVAL_TIME_SOFT_CAP_SECONDS=570,
    HOLDOUT_TOKENS=524288,
    BETA1=0.9,
    ADAM_EPS="1e-8",
    LN_SCALE=1,
    EVAL_WINDOW=0,
    TTT_WEIGHTS="all",
    EMA_ENABLED=1,
    VE_ENABLED=1,
)


@pytest.mark.parametrize("name, left", RETIRED.items())
def test_of_a_retired_setting_only_the_value_that_is_left_is_accepted(name, left):
    spelling.check_names({name: str(left)})
    assert f"{name}='7': only {left} is left of it" in error_of(spelling.check_names, **{name: 7})


def test_what_does_a_retired_settings_work_is_named():
    expected = "EMA_ENABLED='0': only 1 is left of it; EMA_DECAY=0 switches the average off"
    assert error_of(spelling.check_names, EMA_ENABLED=0) == expected


def test_a_retired_number_may_be_written_as_logs_write_it():
    spelling.check_names(dict(ADAM_EPS="1e-08", BETA1="0.90"))


def test_parsing_leaves_other_names_alone_and_tools_read_settings_with_both(monkeypatch):
    assert not RETIRED.keys() & T.FIELDS.keys()
    assert T.parse_settings(dict(NUM_LAYER="3", SWA_EVERY="1")) == T.parse_settings({})
    for name in T.FIELDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NUM_LAYERS", "10")
    assert spelling.read_settings().num_layers == 10
    monkeypatch.setenv("NUM_LAYER", "3")
    assert error_of(lambda _: spelling.read_settings()).startswith("NUM_LAYER is no setting; ")


def test_control_characters_in_values_are_shown_as_such():
    s = T.parse_settings({"DATA_PATH": "a\x1b[2J\nb", "RUN_ID": "d'à"})
    assert T.assignments(s, ["DATA_PATH", "RUN_ID"]) == r"DATA_PATH='a\x1b[2J\nb' RUN_ID=d'à"


@pytest.mark.parametrize(
    "environ, named",
    [
        (dict(MODEL_DIM=510), "MODEL_DIM NUM_HEADS"),
        (dict(MODEL_DIM=24), "MODEL_DIM NUM_HEADS"),
        (dict(NUM_HEADS=3), "MODEL_DIM NUM_HEADS"),
        (dict(NUM_HEADS=1024), "MODEL_DIM NUM_HEADS"),
        (dict(NUM_KV_HEADS=3), "NUM_HEADS NUM_KV_HEADS"),
        (dict(NUM_KV_HEADS=16), "NUM_HEADS NUM_KV_HEADS"),
        (dict(ROPE_DIMS=66), "ROPE_DIMS MODEL_DIM NUM_HEADS"),
        (dict(ROPE_DIMS=15), "ROPE_DIMS"),
        (dict(VE_LAYERS="9,11"), "VE_LAYERS NUM_LAYERS"),
        (dict(NUM_LAYERS=4, VE_LAYERS="2,4"), "VE_LAYERS NUM_LAYERS"),
        (dict(VE_LAYERS="3,3"), "VE_LAYERS"),
        (dict(TRAIN_SEQ_LEN=1000), "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN"),
        (dict(TRAIN_BATCH_TOKENS=786433), "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN"),
        (dict(TRAIN_BATCH_TOKENS=8192), "TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN"),
        (dict(EVAL_STRIDE=2049), "EVAL_STRIDE EVAL_SEQ_LEN"),
        (dict(TTT_CHUNK_TOKENS=1024), "TTT_CHUNK_TOKENS TRAIN_SEQ_LEN"),
        (dict(EVAL_ONLY=1), "EVAL_ONLY ARTIFACT_PATH"),
        (dict(RUN_ID="runs/1"), "RUN_ID"),
        (dict(LOOP_LAYERS="9,10,11"), "LOOP_LAYERS NUM_LAYERS"),
        (dict(LOOP_LAYERS="5,4,3"), "LOOP_LAYERS"),
        (dict(LOOP_LAYERS="3,5"), "LOOP_LAYERS"),
        (dict(LOOP_LAYERS="3,3"), "LOOP_LAYERS"),
        (dict(LOOP_LAYERS="5,6,7", PARALLEL_FROM=7), "PARALLEL_FROM LOOP_LAYERS"),
        (dict(LOOP_LAYERS="5,6,7", PARALLEL_FROM=5), "PARALLEL_FROM LOOP_LAYERS"),
        (dict(PARALLEL_FROM=11), "PARALLEL_FROM NUM_LAYERS"),
        (dict(PARALLEL_FROM=4), "PARALLEL_FROM NUM_LAYERS"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="512@0,512@0.5"), "TRAIN_SEQ_SCHEDULE"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="1024@0,512@0.5"), "TRAIN_SEQ_SCHEDULE"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="512@0,1024@0.5,2048@0.5"), "TRAIN_SEQ_SCHEDULE"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="512@0.1,1024@0.5"), "TRAIN_SEQ_SCHEDULE"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="512@nan"), "TRAIN_SEQ_SCHEDULE"),
        (dict(DOCUMENT_ATTENTION=1, TRAIN_SEQ_SCHEDULE="512@0,2049@0.5"), "TRAIN_SEQ_SCHEDULE TRAIN_SEQ_LEN"),
        (dict(TRAIN_SEQ_SCHEDULE="512@0,1024@0.5"), "TRAIN_SEQ_SCHEDULE DOCUMENT_ATTENTION"),
        (dict(NS_COEFFICIENTS="polar", MUON_BACKEND_STEPS=6), "MUON_BACKEND_STEPS NS_COEFFICIENTS"),
        (dict(RESUME="auto"), "RUN_ID RESUME"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_contradicting_settings_are_named_with_their_values(environ, named):
    message, everything = error_of(**environ), values({}) | environ
    assert re.fullmatch(r"[A-Z_]+(=\w+)? (must|needs) [^;]*; now ([A-Z_]+=\S*( |$))+", message)
    for name in named.split():
        assert f"{name}={T.show(everything[name])}" in message.split("; now ")[1]


@pytest.mark.parametrize(
    "environ, name, value",
    [
        (dict(NUM_LAYERS="10"), "VE_LAYERS", (9,)),
        (dict(NUM_LAYERS="4"), "VE_LAYERS", ()),
        (dict(VE_LAYERS=""), "VE_LAYERS", ()),
        (dict(VE_LAYERS="10, 0"), "VE_LAYERS", (10, 0)),
        (dict(VE_LAYERS="0-2,10"), "VE_LAYERS", (0, 1, 2, 10)),
        (dict(LOOP_LAYERS="3-5"), "LOOP_LAYERS", (3, 4, 5)),
        (dict(LOOP_LAYERS="3,4,5"), "LOOP_LAYERS", (3, 4, 5)),
        (dict(LOOP_LAYERS="10"), "LOOP_LAYERS", (10,)),
        (dict(LOOP_LAYERS="3-6", PARALLEL_FROM="7"), "PARALLEL_FROM", 7),
        (dict(PARALLEL_FROM="5"), "PARALLEL_FROM", 5),
        (dict(PARALLEL_FROM="10"), "PARALLEL_FROM", 10),
        (
            dict(TRAIN_SEQ_SCHEDULE="512@0,2048@.3", DOCUMENT_ATTENTION="1"),
            "TRAIN_SEQ_SCHEDULE",
            ((512, 0.0), (2048, 0.3)),
        ),
        (dict(EVAL_STRIDE="2048"), "EVAL_STRIDE", 2048),
        (dict(ROPE_DIMS="64"), "ROPE_DIMS", 64),
        (dict(XSA_LAST_N="99"), "XSA_LAST_N", 99),
        (dict(BIGRAM_VOCAB_SIZE="0"), "BIGRAM_VOCAB_SIZE", 0),
        (dict(MATRIX_LR="1e-3"), "MATRIX_LR", 0.001),
        (dict(MAX_WALLCLOCK_SECONDS="0"), "MAX_WALLCLOCK_SECONDS", 0.0),
        (dict(NS_COEFFICIENTS="polar", MUON_BACKEND_STEPS="5"), "MUON_BACKEND_STEPS", 5),
        (dict(MUON_BACKEND_STEPS="6"), "MUON_BACKEND_STEPS", 6),
        (dict(TTT_ENABLED="0", TTT_CHUNK_TOKENS="1024"), "TTT_CHUNK_TOKENS", 1024),
    ],
    ids=str,
)
def test_limits_are_allowed(environ, name, value):
    assert values(environ)[name] == value


@pytest.mark.slow
def test_help_prints_every_setting_with_its_default(tmp_path):
    result = tiny.run_process(tmp_path, "--help", NUM_LAYER=3, ITERATIONS="many")  # even then
    assert (result.status, result.err) == (0, "")
    assert (
        "torchrun --standalone --nproc_per_node=8 train_gpt.py" in result.out
        and list(tmp_path.iterdir()) == []
    )
    assert result.out == T.help_text() + "\n"
    lines = dict(re.findall(r"^  ([A-Z0-9_]+)=(.*)$", result.out, re.M))
    assert list(lines) == list(T.FIELDS)
    for name, line in lines.items():
        default, said = line.split("  ")
        assert values({name: default}) == values({}) and default == T.show(T.FIELDS[name].default)
        assert said == f"{T.FIELDS[name].metadata['help']} ({T.allowed(T.FIELDS[name])})"


def test_what_help_says_is_allowed_is_what_is_parsed():
    """For each number its limits, for each choice all of them."""
    for name, f in T.FIELDS.items():
        said, limits = T.allowed(f), re.findall(r"(?:from|to) (\S+)", T.allowed(f))
        if f.metadata["choices"]:
            assert said.split(" or ") == list(f.metadata["choices"])
            assert all(T.parse_value(name, choice) == choice for choice in said.split(" or "))
        elif f.type in (int, float):
            for sign, limit in zip((-1, 1), limits, strict=False):
                assert T.parse_value(name, limit) == float(limit)
                with pytest.raises(T.RunError):
                    T.parse_value(name, str(f.type(float(limit)) + sign))
            assert (len(limits) == 1) == math.isinf(f.metadata["high"])
        else:
            assert limits == []


MODEL = """
NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT ROPE_BASE ROPE_DIMS LOGIT_SOFTCAP
QK_GAIN_INIT XSA_LAST_N BIGRAM_VOCAB_SIZE BIGRAM_DIM VE_DIM VE_LAYERS TIED_EMBED_INIT_STD
SMEAR SKIP_GATES ATTN_GATE_CHANNELS ATTN_GATE_SCALE PARALLEL_FROM LOOP_LAYERS LOOP_COUNT DOCUMENT_ATTENTION
"""
LOCAL = """
DATA_PATH TOKENIZER_PATH RUN_ID ARTIFACT_PATH ARTIFACT_LIMIT EVAL_ONLY CHECKPOINT_EVERY RESUME AUDIT
"""


def test_a_fact_of_each_setting_says_whether_the_artifact_keeps_it():
    kinds = {name: f.metadata["kept"] for name, f in T.FIELDS.items()}
    assert set(kinds.values()) == {"yes", "no", "fixed"}
    assert [name.lower() for name, kind in kinds.items() if kind != "no"] == T.KEPT
    assert [name for name, kind in kinds.items() if kind == "fixed"] == MODEL.split()
    assert [name for name, kind in kinds.items() if kind == "no"] == LOCAL.split()


def test_the_program_stays_within_its_size():
    """DESIGN: when the file gets near the limit, something that has no measured use goes."""
    assert tiny.SCRIPT.stat().st_size <= 110_000


@pytest.mark.parametrize("argument", ["--iterations=3", "-h", "NUM_LAYERS=3", "x"])
def test_an_argument_is_an_error(tmp_path, argument):
    status, out, err = tiny.run(tmp_path, argument)
    assert status != 0 and out == "" and list(tmp_path.iterdir()) == []
    assert (
        err.startswith(f"train_gpt.py: error: unknown argument {argument}")
        and "--help" in err
        and err.count("\n") == 1
    )


def test_no_setting_makes_a_variable_of_the_machine_a_misspelt_one(monkeypatch):
    """A setting CUDA_GRAPHS would otherwise stop every run that has CUDA_VISIBLE_DEVICES."""
    for name in ("CUDA_GRAPHS", "NCCL_TREES", "TORCH_DETERMINISTIC"):
        monkeypatch.setitem(T.FIELDS, name, T.FIELDS["SEED"])
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NCCL_DEBUG", "TORCH_LOGS", "TORCHELASTIC_RUN_ID"):
        assert not spelling.nearest.__wrapped__(name)


def test_a_line_of_the_log_shows_values_as_they_are(capsys):
    log = T.Log()
    log.event("stopped", "go on with {path}, {share:.1%}", path="{x} {0}", share=0.5)
    log.event("data", number=1234567.0, path="{}")
    assert capsys.readouterr().out == "go on with {x} {0}, 50.0%\ndata number:1.23457e+06 path:{}\n"
