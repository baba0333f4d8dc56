"""Settings: the record's defaults, and one clear line for every value, name or combination that cannot be
meant."""

import math
import re

import pytest

import train_gpt as T
from tests import tiny

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
    LN_SCALE=True,
    XSA_LAST_N=4,
    BIGRAM_VOCAB_SIZE=1536,
    BIGRAM_DIM=128,
    VE_ENABLED=True,
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
    BETA1=0.9,
    BETA2=0.95,
    ADAM_EPS=1e-8,
    GRAD_CLIP_NORM=0.3,
    EMA_ENABLED=True,
    EMA_DECAY=0.997,
    SWA_ENABLED=True,
    SWA_EVERY=50,
    LATE_QAT=True,
    LATE_QAT_THRESHOLD=0.15,
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
    EVAL_TIME_SOFT_CAP_SECONDS=570.0,
)


def values(environ):
    s = T.parse_settings(environ)
    return {name: getattr(s, name.lower()) for name in T.FIELDS}


def error_of(**environ):
    """The message that these variables give; it is one line."""
    with pytest.raises(T.RunError) as error:
        T.parse_settings({name: str(value) for name, value in environ.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_are_the_records():
    defaults = values({})
    assert {name: defaults[name] for name in RECORD} == RECORD
    assert {name: type(defaults[name]) for name in RECORD} == {
        name: type(value) for name, value in RECORD.items()
    }


def test_every_setting_is_read_from_the_environment():
    changed = dict(
        DATA_PATH="d",
        TOKENIZER_PATH="t",
        RUN_ID="r",
        ARTIFACT_PATH="a",
        RESUME="c",
        RECIPE="best",
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
            else:
                changed[name] = value + 1 if isinstance(value, int) else value / 2 or 0.5
        assert changed[name] != value
    text = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in changed.items()
        if not isinstance(value, bool)
    }
    text |= {name: str(int(value)) for name, value in changed.items() if isinstance(value, bool)}
    found = values(text)
    assert found == changed
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in values({}).items()
    }


@pytest.mark.parametrize("text", ["many", " ", "0x10", "1;2", "nan", "-1"])
def test_what_does_not_parse_is_named_with_its_value(text):
    names = [name for name, value in values({}).items() if not isinstance(value, str)]
    assert len(names) > 60
    for name in names:
        if (name, text) != ("VE_LAYERS", "-1"):  # parses; no layer has that number
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
        ("RECIPE", "rtn", "record or best", []),
        ("EVAL_MODE", "", "sliding or streaming", []),
        ("VE_LAYERS", "9 10", "comma", []),
        ("VE_LAYERS", "1.5", "comma", []),
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
VAL_BATCHSIZE LATE_QAT_THRESH GRAD_CLIP_NORMS GRAD_CLIP ARTIFACT_PATHS RUN_IDS RUNID NUM_KV RECIPIE
RECEIPE AUDT AUDTI RESUM RESUME_ EVALONLY EVAL_ONLLY EVAL_MOD EVAL_MDOE EVAL_WINDOWS CHECKPOINT_EVRY
CHECKPOINTS_EVERY ARTIFACT_LIMITS TOKENISER_PATH TOKENIZER_PAHT VOCABSIZE VOCAB_SIZES BETA_1 BETA_2 BETA
ADAM_WDD ADAM_ESP MATRIX_RL MATRIX_LRR SCALAR_LRS TIED_EMBED_LRS LOGIT_SOFTCAPS LOGITSOFTCAP QK_GAIN
MLP_MUL MLP_MULTI LN_SCAEL HOLDOUT_TOKEN MICRO_BATCH_TOKEN TRAIN_BATCH_TOKEN TRAIN_BATCH_TOKNES
TRAIN_LOG_EVRY VAL_LOSS_EVRY WARMUP_STEP WARMPU_STEPS TTT_ENABLE TTT_CHUNK TTT_CHUNKS_TOKENS TTT_EPOCH
TTT_LEARNING_RATE TTT_DECAYS ttt_lr Num_Layers EVAL_MAX_SECOND EVAL_SEQLEN EVAL_SEQ_LENGTH EMA_ENABLE
SWA_DISABLE MATRIX_STEPS NUM_HEDS MODEL_DM ITERATIOSN
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
    message = error_of(**{name: 1})
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
    ).items(),
)
def test_the_nearest_setting_is_named(name, nearest):
    assert error_of(**{name: 1}) == f"{name} is no setting; the nearest is {nearest}"


def test_variables_of_other_programs_are_no_settings():
    assert T.parse_settings(dict.fromkeys(OTHERS.split(), "x")) == T.parse_settings({})


def test_of_a_retired_setting_only_the_value_that_is_left_is_accepted():
    assert not T.RETIRED.keys() & T.FIELDS.keys()
    assert T.parse_settings(T.RETIRED) == T.parse_settings({})
    assert error_of(TTT_FREEZE_BLOCKS=2) == "TTT_FREEZE_BLOCKS='2': only 0 is left of it"
    assert error_of(TIE_EMBEDDINGS=0) == "TIE_EMBEDDINGS='0': only 1 is left of it"


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
        (dict(VE_LAYERS="-1,9"), "VE_LAYERS NUM_LAYERS"),
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
        (dict(RESUME="auto"), "RUN_ID RESUME"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_contradicting_settings_are_named_with_their_values(environ, named):
    message, everything = error_of(**environ), values({}) | environ
    assert re.fullmatch(r"[A-Z_]+(=\w+)? (must be|needs) [^;]*; now ([A-Z_]+=\S*( |$))+", message)
    for name in named.split():
        assert f"{name}={everything[name]}" in message.split("; now ")[1]


@pytest.mark.parametrize(
    "environ, name, value",
    [
        (dict(NUM_LAYERS="10"), "VE_LAYERS", (9,)),
        (dict(NUM_LAYERS="4"), "VE_LAYERS", ()),
        (dict(VE_LAYERS=""), "VE_LAYERS", ()),
        (dict(VE_LAYERS="10, 0"), "VE_LAYERS", (10, 0)),
        (dict(EVAL_STRIDE="2048"), "EVAL_STRIDE", 2048),
        (dict(ROPE_DIMS="64"), "ROPE_DIMS", 64),
        (dict(XSA_LAST_N="99"), "XSA_LAST_N", 99),
        (dict(BIGRAM_VOCAB_SIZE="0"), "BIGRAM_VOCAB_SIZE", 0),
        (dict(MATRIX_LR="1e-3"), "MATRIX_LR", 0.001),
        (dict(MAX_WALLCLOCK_SECONDS="0"), "MAX_WALLCLOCK_SECONDS", 0.0),
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
QK_GAIN_INIT LN_SCALE XSA_LAST_N BIGRAM_VOCAB_SIZE BIGRAM_DIM VE_ENABLED VE_DIM VE_LAYERS TIED_EMBED_INIT_STD
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
        T.check_spelling.__wrapped__(name)
