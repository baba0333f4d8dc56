"""Train a GPT in ten minutes, squeeze it into 16,000,000 bytes, then score unseen text while learning from it.

	torchrun --standalone --nproc_per_node=8 train_gpt.py
	EVAL_ONLY=1 ARTIFACT_PATH=logs/RUN_ID.bin python train_gpt.py
	python train_gpt.py --help

The log's last line has the measure, val_bpb, bits per byte. Shapes: B sequences, T positions, D model width, H query and K
key/value heads of width d, L layers, V vocabulary, N tokens, W processes.
"""
import difflib
import hashlib
import io
import json
import lzma
import math
import os
import platform
import re
import resource
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import make_dataclass
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class RunError(Exception):
	"""Something the user can put right, said in one line."""


# ---- Settings: each default, range and help line ----

class Setting(NamedTuple):
	default: object
	help: str
	low: float = 0
	high: float = sys.float_info.max


SETTINGS = dict(  # environment variables, in capitals
	data_path=("./data/datasets/fineweb10B_sp1024", "folder of the shards"),
	tokenizer_path=("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model"),
	vocab_size=(1024, "tokens of the tokenizer", 2, 65536),

	run_id=("", "logs/RUN_ID.txt is the log; empty: a UUID"),
	seed=(1337, "seed of the first weights", 0, 4294967295),
	iterations=(20000, "training steps at most"),
	max_wallclock_seconds=(600.0, "cap on training; 0: none"),
	warmup_steps=(20, "steps that compile"),
	warmdown_iters=(3500, "last steps, learning rate to 0"),
	train_batch_tokens=(786432, "tokens per step", 8),
	train_seq_len=(2048, "training sequence in tokens", 2),
	micro_batch_tokens=(0, "tokens per forward pass; 0: an eighth step"),
	train_log_every=(500, "steps between log lines; 0: none"),
	val_loss_every=(4000, "steps between validations; 0: one"),
	val_batch_size=(524288, "tokens scored at once by 8 processes", 8),
	holdout_tokens=(524288, "last training tokens, to choose by", 1),
	artifact_path=("", "empty: logs/RUN_ID.bin"),
	artifact_limit=(16_000_000, "bytes of code and artifact", 1),
	eval_only=(False, "only score ARTIFACT_PATH"),

	num_layers=(11, "layers", 1),
	model_dim=(512, "model width", 2),
	num_heads=(8, "query heads", 1),
	num_kv_heads=(4, "key/value heads", 1),
	mlp_mult=(3.0, "MLP hidden width over MODEL_DIM", 0.5),
	tie_embeddings=(True, "the head is the embedding table"),
	rope_base=(10000.0, "rotary base", 1),
	rope_dims=(16, "rotating channels of a head", 4),
	logit_softcap=(30.0, "cap * tanh(logits / cap)", 1e-3),
	qk_gain_init=(1.5, "first gain of queries"),
	ln_scale=(True, "inputs by 1/sqrt(layer + 1)"),
	xsa_last_n=(4, "last layers with XSA"),
	bigram_vocab_size=(1536, "rows of the bigram table; below 2: none"),
	bigram_dim=(128, "width of the bigram table", 1),
	ve_enabled=(True, "add value embeddings"),
	ve_dim=(128, "width of their table", 1),
	ve_layers=((9, 10), "layers with value embeddings"),
	tied_embed_init_std=(0.005, "deviation of the first embeddings"),

	matrix_lr=(0.025, "Muon learning rate"),
	scalar_lr=(0.025, "learning rate of the rest"),
	tied_embed_lr=(0.035, "learning rate of the tables"),
	embed_lr=(0.6, "the same if TIE_EMBEDDINGS=0"),
	head_lr=(0.008, "the head's if TIE_EMBEDDINGS=0"),
	muon_momentum=(0.99, "Muon momentum", 0, 1),
	muon_momentum_warmup_start=(0.92, "Muon momentum at step 0", 0, 1),
	muon_momentum_warmup_steps=(1500, "steps until MUON_MOMENTUM"),
	muon_backend_steps=(5, "Newton-Schulz steps", 1),
	muon_wd=(0.04, "weight decay of the banks"),
	adam_wd=(0.04, "weight decay of the rest"),
	beta1=(0.9, "AdamW beta1", 0, 0.999999),
	beta2=(0.95, "AdamW beta2", 0, 0.999999),
	adam_eps=(1e-8, "AdamW epsilon"),
	grad_clip_norm=(0.3, "limit of the gradient norm; 0: none"),

	ema_enabled=(True, "average exponentially (EMA)"),
	ema_decay=(0.997, "decay of the EMA", 0, 1),
	swa_enabled=(True, "average the last steps (SWA)"),
	swa_every=(50, "steps between, below 0.2 of peak rate", 1),
	late_qat=(True, "round weights at the end"),
	late_qat_threshold=(0.15, "learning rate / peak that starts it"),
	quantizer=("gptq", "or rtn: the record's, to the nearest"),
	matrix_step=(1.0, "least mean step; 1: the record's", 0.25, 1000),

	eval_seq_len=(2048, "scoring window in tokens", 2),
	eval_stride=(64, "tokens a sliding window scores", 1),
	eval_time_soft_cap_seconds=(570.0, "no extra epochs past 85% of it"),

	ttt_enabled=(True, "learn from what was scored"),
	ttt_muon=(True, "Newton-Schulz updates; 0: SGD"),
	ttt_ns_steps=(3, "Newton-Schulz steps", 1),
	ttt_entropy_adapt=(True, "epochs + 1 if hard, - 1 if easy"),
	ttt_entropy_high=(2.1, "nats per token that are hard"),
	ttt_entropy_low=(1.75, "nats per token that are easy"),
	ttt_lr=(0.002, "learning rate, a cosine"),
	ttt_epochs=(3, "epochs on a chunk", 1),
	ttt_chunk_tokens=(32768, "tokens scored, then learnt from", 2),
	ttt_batch_seqs=(32, "sequences per update", 1),
	ttt_freeze_blocks=(0, "first layers that do not learn"),
	ttt_momentum=(0.9, "momentum of SGD", 0, 0.999999),
	ttt_grad_clip=(1.0, "limit of the gradient norm; 0: none"),
)

FIELDS = {name.upper(): Setting(*row) for name, row in SETTINGS.items()}
Settings = make_dataclass("Settings", [(name, type(row[0]), row[0]) for name, row in SETTINGS.items()])
GROUPS = dict(DATA_PATH="data", RUN_ID="run", NUM_LAYERS="model", MATRIX_LR="optimizer", EMA_ENABLED="averaging, QAT",
		EVAL_SEQ_LEN="evaluation", TTT_ENABLED="test-time training")
PREFIXES = {name.split("_")[0] + "_" for name in FIELDS} - {  # other programs' too
	"ARTIFACT_", "DATA_", "HEAD_", "MAX_", "MODEL_", "NUM_", "RUN_", "SEED_"}
PARSERS = {
	int: ("an integer", int), float: ("a number", float), str: ("text", str),
	bool: ("0 or 1", {"0": False, "1": True}.__getitem__),
	tuple: ("integers separated by commas", lambda text: tuple(int(part) for part in text.split(",") if part))}
RULES = """
MODEL_DIM % (2 * NUM_HEADS) == 0
NUM_HEADS % NUM_KV_HEADS == 0
ROPE_DIMS % 2 == 0
ROPE_DIMS <= MODEL_DIM // NUM_HEADS
all(0 <= i < NUM_LAYERS and VE_LAYERS.count(i) == 1 for i in VE_LAYERS)
TRAIN_BATCH_TOKENS % (8 * TRAIN_SEQ_LEN) == 0
QUANTIZER in ("gptq", "rtn")
EVAL_STRIDE <= EVAL_SEQ_LEN
TTT_CHUNK_TOKENS >= TRAIN_SEQ_LEN or not TTT_ENABLED
TTT_FREEZE_BLOCKS <= NUM_LAYERS
ARTIFACT_PATH or not EVAL_ONLY
"/" not in RUN_ID
""".strip().split("\n")


def show(value):
	"""As in the environment."""
	if isinstance(value, str):
		return value
	return ",".join(map(str, value)) if isinstance(value, tuple) else str(value + 0).removesuffix(".0")


def allowed(f):
	limits = f" from {f.low}" + f" to {f.high}" * (f.high < sys.float_info.max)
	return PARSERS[type(f.default)][0] + limits * (type(f.default) in (int, float))


def parse_value(name, text):
	f = FIELDS[name]
	try:
		value = PARSERS[type(f.default)][1](text)
		if isinstance(value, (str, tuple)) or f.low <= value <= f.high:
			return value
	except (ValueError, KeyError):
		pass
	raise RunError(f"{name}={text!r}: allowed is {allowed(f)}")


def parse_settings(environ, defaults={}):
	"""From a mapping such as os.environ, else `defaults`. Raises RunError."""
	for name in environ:
		own = name.startswith(tuple(PREFIXES)) or "_" in name and any(field.startswith(name) for field in FIELDS)
		nearest = difflib.get_close_matches(name, FIELDS, 1, 0 if own else 0.91)
		if nearest and name not in FIELDS:
			raise RunError(f"{name} is no setting; the nearest is {nearest[0]} (--help lists all)")
	values = defaults | {name.lower(): parse_value(name, environ[name]) for name in FIELDS if name in environ}
	s = Settings(**values)
	if s.eval_only and s.artifact_path and not defaults:
		return s  # the artifact's are still to come
	if "ve_layers" not in values:  # the default's, of a shallower model
		s.ve_layers = tuple(i for i in s.ve_layers if i < s.num_layers)
	values = {name.upper(): value for name, value in vars(s).items()}
	for rule in RULES:
		if not eval(rule, values):
			now = [f"{name}={show(values[name])}" for name in FIELDS if name in re.findall(r"\w+", rule)]
			raise RunError(f"must hold: {rule}; now {' '.join(now)}")
	return s


def help_text():
	lines = ["usage: [NAME=value ...] torchrun --standalone --nproc_per_node=8 train_gpt.py"]
	for name, f in FIELDS.items():
		lines += ["", GROUPS[name] + ":"] if name in GROUPS else []
		lines.append(f"  {name + '=' + show(f.default):38} {f.help} ({allowed(f)})")
	return "\n".join(lines)


# ---- Processes, one a GPU; on a single one every helper is a no-op ----

def world_size():
	return dist.get_world_size() if dist.is_initialized() else 1


def rank():
	return dist.get_rank() if dist.is_initialized() else 0


def start_processes():
	"""Join torchrun's process group, if any, and return the device. Raises RunError."""
	world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
	if world not in (1, 2, 4, 8):
		raise RunError(f"world size {world}: use 1, 2, 4 or 8 processes")
	cuda = torch.cuda.is_available()
	if cuda:
		if local >= torch.cuda.device_count():
			raise RunError(f"no GPU for process {local}: lower --nproc_per_node")
		torch.cuda.set_device(local)
	if world > 1:
		dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
	return torch.device(f"cuda:{local}" if cuda else "cpu")


def all_reduce(tensor):
	"""Sum a tensor over the processes, in place."""
	if world_size() > 1:
		dist.all_reduce(tensor)
	return tensor


def all_reduce_list(tensors):
	"""The same for tensors of one dtype, as one message."""
	if world_size() > 1:
		flat = all_reduce(torch.cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
		torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat, tensors)])


def from_rank0(value):
	"""Rank 0's value, any object, on every rank."""
	holder = [value]
	if world_size() > 1:
		dist.broadcast_object_list(holder)
	return holder[0]


def together(action):
	"""action()'s result; what one rank raises, all raise as RunError."""
	result = error = None
	try:
		result = action()
	except (RunError, OSError) as e:
		error = str(e)
	if all_reduce(torch.tensor(float(error is not None))):
		errors = [error] * world_size()
		if world_size() > 1:
			dist.all_gather_object(errors, error)
		raise RunError(next(filter(None, errors)))
	return result


def share(total):
	"""This rank's contiguous part [low, high) of `total` items."""
	return total * rank() // world_size(), total * (rank() + 1) // world_size()


log_file = None  # rank 0's logs/RUN_ID.txt


def log(line):
	if rank() == 0:
		for file in filter(None, (sys.stdout, log_file)):
			print(line, file=file, flush=True)


def progress_of(stage):
	"""A function that logs the remaining time every ten seconds, given the finished fraction."""
	times = [time.perf_counter()]

	def report(done):
		now = time.perf_counter()
		if now > times[-1] + 10 and done > 0:
			times.append(now)
			log(f"progress: {stage} {done:.0%}, {(now - times[0]) * (1 / done - 1):.0f} s left")

	return report


def open_outputs(log_path, artifact_path, source):
	"""Rank 0's log, which begins with the source. Raises OSError, also if the artifact cannot be written."""
	global log_file
	if rank() == 0:
		log_path.parent.mkdir(parents=True, exist_ok=True)
		if log_path.exists():
			os.replace(log_path, f"{log_path}.previous")
		log_file = open(log_path, "w", encoding="utf-8")
		print(source, "=" * 100, sep="\n", file=log_file)
		if artifact_path:
			artifact_path.parent.mkdir(parents=True, exist_ok=True)
			if artifact_path.is_dir() or not os.access(artifact_path.parent, os.W_OK):
				raise OSError(f"ARTIFACT_PATH={artifact_path} cannot be written")


def write_atomically(path, data):
	"""Under its name a file is whole or not there. Raises OSError."""
	temporary = path.with_name(f"{path.name}.tmp")
	try:
		temporary.write_bytes(data)
		os.replace(temporary, path)
	finally:
		temporary.unlink(missing_ok=True)


@torch.no_grad()
def copy_weights(weights, values):
	torch._foreach_copy_(weights, values)


@contextmanager
def undone(weights):
	before = [w.detach().clone() for w in weights]
	yield
	copy_weights(weights, before)


# ---- Tokens and bytes ----

GET_DATA = "get data by `make demo` or `python tools/fineweb.py`"


def load_tokenizer(path, vocab_size):
	"""(tokenizer, SHA-256 of its file). Raises RunError."""
	tokenizer = sentencepiece.SentencePieceProcessor()
	try:
		data = Path(path).read_bytes()
		tokenizer.LoadFromSerializedProto(data)
	except (OSError, RuntimeError):
		raise RunError(f"TOKENIZER_PATH={path} is no SentencePiece model; {GET_DATA}") from None
	if tokenizer.vocab_size() != vocab_size:
		raise RunError(f"TOKENIZER_PATH={path} has {tokenizer.vocab_size()} tokens but VOCAB_SIZE={vocab_size}")
	return tokenizer, hashlib.sha256(data).hexdigest()


class ByteTables(NamedTuple):
	"""(V,) each: bytes without leading space; has it one; control, unknown or unused."""
	base_bytes: Tensor
	has_leading_space: Tensor
	is_boundary: Tensor

	def count(self, previous, target):
		"""Bytes of targets; behind a boundary a leading space is dropped."""
		return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])


def byte_tables(tokenizer):
	rows = []
	for i in range(tokenizer.vocab_size()):
		boundary = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
		text = tokenizer.id_to_piece(i).replace("\u2581", " ")
		space = not boundary and text.startswith(" ")
		rows.append((0 if boundary else 1 if tokenizer.is_byte(i) else len(text.encode()) - space, space, boundary))
	return ByteTables(*map(torch.tensor, zip(*rows)))


# ---- Data ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def open_shard(path):
	"""Map a shard, little-endian: 256 int32 (magic, version, count N, zeros), N uint16 tokens. Raises RunError, OSError."""
	header, size, offset = np.fromfile(path, "<i4", 3).tolist(), os.path.getsize(path), 4 * SHARD_HEADER_INTS
	if header[:2] != [SHARD_MAGIC, SHARD_VERSION] or header[2:] < [1] or size != offset + 2 * header[2]:
		raise RunError(f"shard {path}: {size} bytes and header {header}, not {offset} + 2 N and [{SHARD_MAGIC}, "
				f"{SHARD_VERSION}, N]")
	return np.memmap(path, "<u2", "r", offset)


def open_shards(data_path, split):
	"""In name order. Raises RunError, OSError."""
	shards = [open_shard(path) for path in sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))]
	if not shards:
		raise RunError(f"DATA_PATH={data_path} has no fineweb_{split}_*.bin; {GET_DATA}")
	return shards


def check_ids(tokens, vocab_size, where):
	"""The tokens as int32. Raises RunError if an id is not below vocab_size."""
	if tokens.max() >= vocab_size:
		raise RunError(f"{where}: token id {tokens.max()} is not below VOCAB_SIZE={vocab_size}")
	return torch.from_numpy(tokens.astype(np.int32))


def validation_tokens(data_path, vocab_size, window):
	"""All of it, (N + 1,) int32. Raises RunError."""
	tokens = check_ids(np.concatenate(open_shards(data_path, "val")), vocab_size, "validation shards")
	if len(tokens) <= window:
		raise RunError(f"validation shards: {len(tokens)} tokens do not fill EVAL_SEQ_LEN={window}")
	return tokens


def read_stream(shards, position, count):
	"""`count` tokens from `position` on in the endless stream of the shards, again and again."""
	parts, position = [], position % sum(map(len, shards))
	for shard in cycle(shards):
		parts.append(shard[position:position + count])
		position, count = max(position - len(shard), 0), count - len(parts[-1])
		if count == 0:
			return np.concatenate(parts)


def split_holdout(shards, tokens, seq_len):
	"""Cut off the last shard's tail, at most `tokens` and a quarter of it, whole sequences + 1. Raises RunError."""
	held = min(tokens, len(shards[-1]) // 4) // seq_len * seq_len + 1
	if held == 1:
		raise RunError(f"TRAIN_SEQ_LEN={seq_len} exceeds HOLDOUT_TOKENS or a quarter of the last train shard")
	return shards[:-1] + [shards[-1][:-held]], shards[-1][-held:]


def batches(shards, span, vocab_size):
	"""Yield this rank's spans of each step, (8 / W, span + 1) int32, read ahead on a thread. The m-th of rank r is number
	m * W + r of the step's 8. Raises RunError."""
	def read(step):
		return torch.stack([check_ids(read_stream(shards, i * (span + 1), span + 1), vocab_size, f"training span {i}")
				for i in range(8 * step + rank(), 8 * step + 8, world_size())])

	with ThreadPoolExecutor(1) as pool:
		ahead = pool.submit(read, 0)
		for step in count(1):
			spans, ahead = ahead.result(), pool.submit(read, step)
			yield spans


# ---- Model ----

def torch_attention(q, k, v):
	"""q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
	q, k, v = (t.transpose(1, 2) for t in (q, k, v))
	return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def choose_attention(device):
	"""(name, function): FlashAttention 3, if it compiles and runs here, else PyTorch's."""
	try:
		from flash_attn_interface import flash_attn_func
		attention = lambda q, k, v: flash_attn_func(q, k, v, causal=True)
		x = torch.zeros(1, 128, 8, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
		torch.compile(attention, fullgraph=True)(x, x, x).sum().backward()
		return "FlashAttention 3", attention
	except (ImportError, OSError, RuntimeError, AttributeError):  # it may return a tuple
		return "PyTorch", torch_attention


def norm(x):
	return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length, dims, base, device):
	"""cos and sin, (T, 1, dims / 2) fp32; the base grows beyond 1,024 positions."""
	base *= max(1, length / 1024) ** (dims / (dims - 2))
	frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
	angles = torch.outer(torch.arange(length, device=device), frequencies)[:, None]
	return angles.cos(), angles.sin()


def rotate(x, cos, sin):
	"""Rotate the first channels of each head of x (B, T, heads, d), channel i with channel i + dims / 2."""
	x1, x2, rest = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), dim=-1)
	return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def new(*shape, value=0.0, on=True):
	return nn.Parameter(torch.full(shape, value)) if on else None


def new_lookup(rows, width, out, scale):
	return new(rows, width, on=rows > 1), new(out, width, on=rows > 1 and width != out), new(value=scale, on=rows > 1)


class Block(nn.Module):
	"""A layer: attention, then MLP, on a mix of stream and embedding."""

	def __init__(self, s, layer, attention):
		super().__init__()
		self.s, self.layer, self.attention, D = s, layer, attention, s.model_dim
		self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
		self.attn_scale, self.mlp_scale = new(D, value=1.0), new(D, value=1.0)
		self.q_gain = new(s.num_heads, value=s.qk_gain_init)

	def forward(self, x, x0, value_embedding, rotary, qkv_w, o_w, up_w, down_w):
		"""x, x0 (B, T, D), value_embedding (B, T, K*d) or None -> (B, T, D)."""
		H, K, scale = self.s.num_heads, self.s.num_kv_heads, (self.layer + 1) ** -0.5 if self.s.ln_scale else 1.0
		attn_scale, mlp_scale, (m0, m1) = (p.to(x.dtype) for p in (self.attn_scale, self.mlp_scale, self.resid_mix))
		u = m0 * x + m1 * x0
		q, k, v = F.linear(norm(u) * scale, qkv_w).unflatten(-1, (H + 2 * K, -1)).split((H, K, K), dim=2)
		if value_embedding is not None:
			v = v + value_embedding.view_as(v)
		a = self.attention(rotate(norm(q), *rotary) * self.q_gain.to(x.dtype)[:, None], rotate(norm(k), *rotary), v)
		if self.layer >= self.s.num_layers - self.s.xsa_last_n:  # keep nothing along the position's own value
			a, along = a.unflatten(2, (K, -1)), F.normalize(v, dim=-1).unsqueeze(3)
			a = a - (a * along).sum(-1, keepdim=True) * along
		y = u + attn_scale * F.linear(a.flatten(2), o_w)
		h = F.leaky_relu(F.linear(norm(y) * scale, up_w), 0.5).square()
		return y + mlp_scale * F.linear(h, down_w)


class GPT(nn.Module):
	"""fp32 weights, cast to `dtype` where used. The large matrices live in four banks: qo_bank (2L, D, D), layer i's query
	matrix at i, output at L + i; kv_bank (2L, K*d, D) likewise; up_bank (L, hidden, D); down_bank (L, D, hidden)."""
	BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")

	def __init__(self, s, attention=torch_attention, dtype=torch.float32):
		super().__init__()
		self.s, self.dtype, self.encoder_layers = s, dtype, s.num_layers // 2
		self.ve_layers = s.ve_layers if s.ve_enabled else ()
		L, V, D, values = s.num_layers, s.vocab_size, s.model_dim, len(self.ve_layers)
		KD, hidden = D // s.num_heads * s.num_kv_heads, int(s.mlp_mult * D)
		self.qo_bank, self.kv_bank = new(2 * L, D, D), new(2 * L, KD, D)
		self.up_bank, self.down_bank = new(L, hidden, D), new(L, D, hidden)
		self.tok_emb, self.head = new(V, D), new(V, D, on=not s.tie_embeddings)
		self.bigram_table, self.bigram_proj, self.bigram_scale = new_lookup(s.bigram_vocab_size, s.bigram_dim, D, 0.05)
		self.ve_table, self.ve_proj, self.ve_scale = new_lookup(V if values else 0, s.ve_dim, KD, 0.1)
		self.ve_layer_scales, self.smear_gate = new(values, value=1.0, on=values > 0), new(D)
		self.skip_weights = new(L // 2, D, value=1.0, on=L > 1)
		self.blocks = nn.ModuleList(Block(s, layer, attention) for layer in range(L))

	@torch.no_grad()
	def initialize(self):
		self.tok_emb.normal_(0, self.s.tied_embed_init_std)
		if self.ve_layers:
			self.ve_table.normal_(0, 0.01)
		projections = [p for p in (self.bigram_proj, self.ve_proj) if p is not None and min(p.shape) >= 64]
		for matrix in [*self.qo_bank[:len(self.blocks)], *self.kv_bank, *self.up_bank, *projections]:
			nn.init.orthogonal_(matrix)
		return self

	def compile_on_cuda(self):
		if self.tok_emb.is_cuda:
			self.compile(dynamic=False, fullgraph=True)
		return self

	def banks(self):
		return [getattr(self, name) for name in self.BANKS]

	def quantized(self):
		"""The weights that the artifact holds as integers, by name."""
		return {name: w for name, w in self.named_parameters(recurse=False) if w.dim() > 1 and name != "skip_weights"}

	def matrices(self, steps=None):
		"""The banks, rounded to `steps` if given, cast, as forward() takes them: q, k, v (L, D + 2*K*d, D), o, up, down."""
		L, banks = len(self.blocks), self.banks()
		if steps:  # the gradient passes straight through
			limit = 31 if self.s.quantizer == "rtn" else MOST
			rounded = [round_to(bank, steps[name], limit) * steps[name] for name, bank in zip(self.BANKS, banks)]
			banks = [r.detach() + (bank - bank.detach()) for r, bank in zip(rounded, banks)]
		qo, kv, up, down = (bank.to(self.dtype) for bank in banks)
		return [torch.cat((qo[:L], kv[:L], kv[L:]), dim=1), qo[L:], up, down]

	def forward(self, tokens, targets, matrices=None):
		"""tokens, targets (B, T) int64 -> negative log-likelihoods in nats (B, T) fp32."""
		logits = self.logits(tokens, matrices)
		return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

	def logits(self, tokens, matrices=None):
		"""(B, T) int64 -> (B, T, V) fp32."""
		s, layers = self.s, zip(*(m.unbind() for m in matrices or self.matrices()))
		rotary = [t.to(self.dtype) for t in rotary_tables(tokens.size(1), s.rope_dims, s.rope_base, tokens.device)]
		x = x0 = self.embed(tokens)
		values = self.lookup("ve", tokens) if self.ve_layers else None
		skips = []
		for i, (block, weights) in enumerate(zip(self.blocks, layers)):
			if i >= self.encoder_layers and skips:
				x = x + self.skip_weights[i - self.encoder_layers].to(x.dtype) * skips.pop()
			ve = self.ve_layer_scales[self.ve_layers.index(i)].to(x.dtype) * values if i in self.ve_layers else None
			x = block(x, x0, ve, rotary, *weights)
			if i < self.encoder_layers:
				skips.append(x)
		head = self.tok_emb if self.head is None else self.head
		return s.logit_softcap * torch.tanh(F.linear(norm(x), head.to(x.dtype)).float() / s.logit_softcap)

	def lookup(self, name, index):
		table, projection, scale = (getattr(self, f"{name}_{part}") for part in ("table", "proj", "scale"))
		x = F.embedding(index, table).to(self.dtype)
		return (x if projection is None else F.linear(x, projection.to(self.dtype))) * scale.to(self.dtype)

	def embed(self, tokens):
		"""Token plus hashed-bigram embedding, normed, then mixed with the position before: (B, T, D)."""
		x = F.embedding(tokens, self.tok_emb).to(self.dtype)
		if self.bigram_table is not None:
			t, last = tokens.int(), len(self.bigram_table) - 1
			bucket = F.pad((36313 * t[:, 1:] ^ 27191 * t[:, :-1]) % last, (1, 0), value=last)
			x = x + self.lookup("bigram", bucket)
		x, gate = norm(x), torch.sigmoid(self.smear_gate).to(self.dtype)
		return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))

	def zero_frozen_gradients(self, n):
		layers = [*range(len(self.blocks))]
		rows = dict.fromkeys(self.banks(), 2 * layers)  # whose layers they are
		rows |= {self.ve_layer_scales: self.ve_layers, self.skip_weights: layers[self.encoder_layers:]}
		frozen = [grad for p in rows if p is not None for grad, layer in zip(p.grad, rows[p]) if layer < n]
		for grad in frozen + [p.grad for p in self.blocks[:n].parameters()]:
			grad.zero_()


# ---- Optimizers ----

def newton_schulz(G, steps):
	"""Push the singular values of each G (..., rows, columns) towards 1, in bf16, by the quintic iteration of
	https://kellerjordan.github.io/posts/muon (Jordan et al. 2024)."""
	tall = G.size(-2) > G.size(-1)
	X = (G.mT if tall else G).bfloat16()
	X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
	for _ in range(steps):
		A = X @ X.mT
		X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
	return X.mT if tall else X


def muon_update(grad, buffer, momentum, steps):
	"""Nesterov momentum (in `buffer`, bf16), orthogonalised: (n, rows, columns) -> the same in bf16."""
	g = grad.bfloat16()
	buffer.mul_(momentum).add_(g)
	return newton_schulz(g.add(buffer, alpha=momentum), steps)


def apply_muon_update(bank, update, lr, weight_decay):
	rows, columns = bank.shape[-2:]
	bank.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * max(1, rows / columns) ** 0.5)


reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Optimizers:
	"""Muon, shared out over the ranks, beside AdamW on each. Gradients of banks (n, rows, columns), the largest first, are
	reduce-scattered as (ceil(n / W), rows, columns), orthogonalised, all-gathered while AdamW steps."""

	def __init__(self, model, s):
		self.model, self.s, groups = model, s, {}
		self.banks = sorted(model.banks(), key=torch.numel, reverse=True)
		self.momentum = [bank.new_zeros((-(-len(bank) // world_size()), *bank.shape[1:]), dtype=torch.bfloat16)
				for bank in self.banks]
		table_lr = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
		rates = dict(tok_emb=table_lr, bigram_table=table_lr, ve_table=table_lr, head=s.head_lr)
		for name, p in model.named_parameters():
			if name not in model.BANKS:
				groups.setdefault(rates.get(name, s.scalar_lr), []).append(p)
		self.adamw = torch.optim.AdamW([dict(base_lr=lr, params=group) for lr, group in groups.items()],
				betas=(s.beta1, s.beta2), eps=s.adam_eps, weight_decay=s.adam_wd, fused=True)

	@torch.no_grad()
	def step(self, multiplier, momentum):
		"""Sum gradients over the ranks, clip, update, clear. Returns the unclipped norm, on the device."""
		s, W, groups, works = self.s, world_size(), self.adamw.param_groups, []
		shards, grads = [bank.grad for bank in self.banks], [p.grad for group in groups for p in group["params"]]
		if W > 1:
			shards = [torch.empty_like(buffer, dtype=torch.float32) for buffer in self.momentum]
			for bank, shard in zip(self.banks, shards):
				padded = F.pad(bank.grad, (0, 0, 0, 0, 0, len(shard) * W - len(bank)))
				works.append(reduce_scatter(shard, padded, async_op=True))
			all_reduce_list(grads)
			while works:
				works.pop().wait()
		total = (all_reduce(nn.utils.get_total_norm(shards) ** 2) + nn.utils.get_total_norm(grads) ** 2).sqrt()
		if s.grad_clip_norm:
			torch._foreach_mul_(shards + grads, (s.grad_clip_norm / (total + 1e-6)).clamp(max=1))
		updates = []
		for shard, buffer in zip(shards, self.momentum):
			update = muon_update(shard, buffer, momentum, s.muon_backend_steps).contiguous()
			if W > 1:
				own, update = update, update.new_empty((len(shard) * W, *shard.shape[1:]))
				works.append(all_gather(update, own, async_op=True))
			updates.append(update)
		for group in groups:
			group["lr"] = group["base_lr"] * multiplier
		self.adamw.step()
		for work in works:
			work.wait()
		for bank, update in zip(self.banks, updates):
			apply_muon_update(bank, update[:len(bank)], s.matrix_lr * multiplier, s.muon_wd)
		self.model.zero_grad()
		return total


def lr_multiplier(step, s, elapsed_ms, budget_ms):
	"""1, then linearly to 0 over the last WARMDOWN_ITERS steps of ITERATIONS or of those that fit the budget."""
	left = s.iterations - step
	if budget_ms < math.inf:
		left = max(budget_ms - elapsed_ms, 0.0) / max(elapsed_ms / max(step, 1), 1e-9)
	return min(1.0, left / max(s.warmdown_iters, 1))


def muon_momentum(step, s):
	fraction = min(step / max(s.muon_momentum_warmup_steps, 1), 1)
	return (1 - fraction) * s.muon_momentum_warmup_start + fraction * s.muon_momentum


# ---- Averaging ----

class WeightAverages:

	def __init__(self, weights, s):
		self.weights, self.s, self.swa, self.swa_count = weights, s, None, 0
		self.ema = self.copy() if s.ema_enabled else None

	def copy(self):
		return [w.detach().clone() for w in self.weights]

	@torch.no_grad()
	def update(self, step, multiplier):
		if self.ema:
			torch._foreach_lerp_(self.ema, self.weights, 1 - min(self.s.ema_decay, (1 + step) / (10 + step)))
		if self.s.swa_enabled and multiplier < 0.2 and step % self.s.swa_every == 0:
			self.swa, self.swa_count = self.swa or self.copy(), self.swa_count + 1
			torch._foreach_lerp_(self.swa, self.weights, 1 / self.swa_count)

	def candidates(self):
		found = dict(raw=self.copy(), ema=self.ema, swa=self.swa)
		return {name: weights for name, weights in found.items() if weights}


# ---- Quantization: each row in steps by how the loss feels them ----

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
TINY = 2.0 ** -24  # the least fp16 above zero
MOST = 4095  # the largest integer a weight becomes


def round_to(w, step, limit):
	return (w / step).round().clamp(-limit, limit)


def clip_steps(w, quantiles, limit, floor=TINY, dtype=torch.half):
	"""The record's steps of w (rows, columns), (rows, 1): the quantile of |w| of least squared error, over limit."""
	clips = torch.quantile(w.abs(), w.new_tensor(quantiles), dim=1, keepdim=True)
	return min(((clip / limit).clamp_min(floor).to(dtype).float() for clip in clips),
			key=lambda step: (round_to(w, step, limit) * step - w).square().mean().item())


class InputMoments(TorchFunctionMode):
	"""While active, .sums (L, columns, columns) gather x x^T of what F.linear multiplies by each of `matrices`."""

	def __init__(self, matrices):
		super().__init__()
		self.sums = [m.new_zeros(len(m), m.size(-1), m.size(-1), dtype=torch.float32) for m in matrices]
		self.at = {one.data_ptr(): total for m, sums in zip(matrices, self.sums) for one, total in zip(m, sums)}

	def __torch_function__(self, function, types, args=(), kwargs=None):
		if function is F.linear and args[1].data_ptr() in self.at:
			x = args[0].detach().flatten(0, -2).float()
			self.at[args[1].data_ptr()].addmm_(x.mT, x)
		return function(*args, **(kwargs or {}))


def calibrate(model, tokens, seq_len):
	"""From tokens (N + 1,), shared out over the ranks, two dicts: the mean x x^T of the inputs of qkv, o, up and down, (L,
	columns, columns); by name each row's Fisher information, (..., rows, 1): the mean squared gradient of a token's loss
	for a label drawn by the model. The loss rises by half of it times a weight's squared error."""
	count = (len(tokens) - 1) // seq_len * seq_len
	groups = tokens[:count].view(-1, seq_len).long().split(max(1, 2048 // seq_len))
	weights, matrices = model.quantized(), model.matrices()
	moments, fisher = InputMoments(matrices), {name: torch.zeros_like(w[..., :1]) for name, w in weights.items()}
	for i in range(*share(len(groups))):
		with moments:
			logits = model.logits(groups[i], matrices).flatten(0, 1)
		random = torch.empty_like(logits).exponential_(generator=torch.Generator(tokens.device).manual_seed(i))
		F.cross_entropy(logits, (logits.detach() - random.log()).argmax(dim=-1), reduction="sum").backward()
		for name, w in weights.items():
			fisher[name] += w.grad.square().mean(dim=-1, keepdim=True)
		model.zero_grad()
	sums = [*moments.sums, *fisher.values()]
	all_reduce_list(sums)
	torch._foreach_div_(sums, count)
	sums[-1].sum().item()  # wait: this is timed
	return dict(zip(("qkv", "o", "up", "down"), moments.sums)), fisher


@torch.no_grad()
def base_steps(s, model, fisher):
	"""Steps (..., rows, 1) by name: the record's or, with GPTQ, on the banks' average as fine ones, such that a bit is worth
	the same everywhere: step ~ 1 / sqrt(Fisher information), within 8 times the matrix's mean."""
	steps = {}
	for name, w in model.quantized().items():
		clip = (CLIP_QUANTILES, 31) if name in model.BANKS else ([0.9999984], 127)
		steps[name] = torch.cat([clip_steps(m, *clip) for m in w.view(-1, *w.shape[-2:])]).view_as(w[..., :1])
	if s.quantizer == "rtn":
		return steps
	octaves = lambda steps: sum(steps[n].log2().mean() * getattr(model, n).numel() for n in model.BANKS)
	fineness = octaves(steps)
	for name, f in fisher.items():
		mean = f.mean(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
		steps[name] = f.clamp(mean / 64, mean * 64).rsqrt()
	ratio = ((fineness - octaves(steps)) / sum(bank.numel() for bank in model.banks())).exp2()
	return {name: (step * ratio).maximum(getattr(model, name).abs().amax(-1, keepdim=True) / 900)
			for name, step in steps.items()}


def scaled(s, base, knob):
	"""base times knob, fp16 held as fp32. GPTQ's are eighths of octaves, which take fewer bytes."""
	steps = {name: step * knob for name, step in base.items()}
	if s.quantizer == "gptq":
		steps = {name: (8 * step.log2()).round().div(8).exp2() for name, step in steps.items()}
	return {name: step.clamp(TINY, 65504).half().float() for name, step in steps.items()}


def factor(moments):
	"""(columns by falling input, (n, columns); upper Cholesky factors of the inverses in that order, damped, in place)."""
	order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
	for m, o in zip(moments, order):
		damped = m[o][:, o] + torch.eye(len(m), device=m.device) * (0.05 * m.trace() / len(m)).clamp_min(1e-9)
		m.copy_(torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True))
	return order, moments


def gptq(bank, step, order, upper):
	"""Integers of bank (n, rows, columns) in steps (n, rows, 1), given factor() of its inputs: the columns to come make good
	each one's rounding (Frantar et al. 2022, https://arxiv.org/abs/2210.17323)."""
	order = order[:, None].expand_as(bank)
	w, q, step = bank.gather(2, order), torch.empty_like(bank), step[..., 0]
	for low in range(0, bank.size(-1), 128):
		high = min(low + 128, bank.size(-1))
		errors = torch.empty_like(w[..., low:high])
		for j in range(low, high):
			q[..., j] = (w[..., j] / step).round()
			errors[..., j - low] = error = (w[..., j] - q[..., j] * step) / upper[:, j, j, None]
			w[..., j:high] -= error[..., None] * upper[:, None, j, j:high]
		w[..., high:] -= errors @ upper[:, low:high, high:]
	return w.scatter_(2, order, q)


@torch.no_grad()
def quantize(s, weights, steps, factors={}):
	"""NAME -> int16 and NAME.scale -> fp16 for what has steps (without factors: to the nearest), else NAME -> fp16."""
	inputs = dict(qo_bank=("qkv", "o"), kv_bank=("qkv", "qkv"), up_bank=("up",), down_bank=("down",)) if factors else {}
	stored = {name: w.half() for name, w in weights.items() if name not in steps}
	for name, step in steps.items():
		limit = MOST if s.quantizer == "gptq" else 31 if name in GPT.BANKS else 127
		own = [torch.cat(parts) if parts[1:] else parts[0] for parts in zip(*(factors[x] for x in inputs.get(name, ())))]
		q = gptq(weights[name], step, *own) if own else weights[name] / step
		stored[name], stored[name + ".scale"] = q.round_().clamp_(-limit, limit).short(), step.half()
	return stored


def dequantize(stored):
	return {name: t.float() * stored.get(name + ".scale", 1)
			for name, t in stored.items() if not name.endswith(".scale")}


# ---- Entropy coding and artifact ----

PRECISION = 14  # a context's frequencies sum to 2 ** PRECISION


def row_contexts(q):
	"""q (..., rows, columns) -> (..., rows) uint8 from 0 to 31: the rms of a row's integers in half octaves."""
	return (4 + 2 * (0.25 + q.float().square().mean(dim=-1).sqrt()).log2()).round().byte()


def count_integers(stored):
	"""(32, 2 * MOST + 1): how often each integer from -MOST on occurs in each context."""
	counts = torch.zeros(32, 2 * MOST + 1, dtype=torch.int64)
	for t in stored.values():
		if t.dtype == torch.int16:
			for q in t.flatten(0, -2).split(1024):
				at = row_contexts(q).int()[:, None] * counts.size(1) + MOST + q
				counts += torch.bincount(at.flatten(), minlength=counts.numel()).view_as(counts).cpu()
	return counts


def estimate_bytes(stored):
	"""The artifact's: the entropy of its integers, and about what the rest takes."""
	counts = count_integers(stored).double()
	bits = -torch.xlogy(counts, counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).sum() / math.log(2)
	return bits.item() / 8 + 1.5 * sum(t.numel() for t in stored.values() if t.dtype == torch.half) + 6000


def fit_knob(s, model, size, limit, knob):
	"""MATRIX_STEP, if its size(knob) bytes are within `limit`, else a knob for (limit - 20,000, limit]. Doubling it takes
	about a bit from each weight."""
	weights = sum(w.numel() for w in model.quantized().values())
	for _ in range(16):
		excess = size(knob) - limit
		if excess <= 0 and (excess > -20000 or knob <= s.matrix_step) or knob > 1000 * s.matrix_step:
			break
		knob = max(s.matrix_step, knob * 2 ** (8 * (excess + 8000) / weights))
	return knob


def lanes_of(n):
	return max(16, min(2048, n // 16384))


def frequencies(counts):
	"""counts (contexts, symbols) in proportion, at least 1 for what occurs, such that each context has 2 ** PRECISION."""
	some = counts > 0
	shares = (2**PRECISION - some.sum(axis=1, keepdims=True)) / counts.sum(axis=1, keepdims=True)
	return (np.diff(np.rint(counts.cumsum(axis=1) * shares), prepend=0) + some).astype(np.uint64)


def rans_encode(frequency, contexts, symbols):
	"""The bytes of symbols (n,), given contexts (n,) and frequency (contexts, symbols) uint64: asymmetric numeral systems
	(Duda 2013, https://arxiv.org/abs/1311.2540), interleaved (Giesen 2014, https://arxiv.org/abs/1402.3392). Lane i codes
	symbols i, i + lanes, ... from last to first; its state, from 2^16 to 2^32, spills 16 bits at a time."""
	start, lanes, words = frequency.cumsum(axis=1) - frequency, lanes_of(len(symbols)), []
	states = np.full(lanes, 2**16, np.uint64)
	for row in reversed(range(0, len(symbols), lanes)):
		at = contexts[row:row + lanes], symbols[row:row + lanes]
		f, x = frequency[at], states[:len(at[0])]
		full = x >= f << (32 - PRECISION)
		words.append(x[full].astype("<u2").tobytes())
		x[full] >>= 16
		x[:] = (x // f << PRECISION) + x % f + start[at]
	return b"".join((states.astype("<u4").tobytes(), *reversed(words)))


def rans_decode(frequency, contexts, data):
	"""The symbols (n,) uint16 of contexts (n,). Raises ValueError unless data is what rans_encode() wrote."""
	start, lanes, at = frequency.cumsum(axis=1) - frequency, lanes_of(len(contexts)), 0
	symbol_at = np.stack([np.repeat(np.arange(len(f), dtype=np.uint16), f.astype(int)) for f in frequency])
	states, symbols = np.frombuffer(data, "<u4", lanes).astype(np.uint64), np.empty(len(contexts), np.uint16)
	words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint64)
	for row in range(0, len(contexts), lanes):
		context = contexts[row:row + lanes]
		x = states[:len(context)]
		slot = x & (2**PRECISION - 1)
		symbols[row:row + lanes] = symbol = symbol_at[context, slot]
		x[:] = frequency[context, symbol] * (x >> PRECISION) + slot - start[context, symbol]
		low = x < 2**16
		spilled = words[at:at + np.count_nonzero(low)]
		x[low] = x[low] << 16 | spilled
		at += len(spilled)
	if at != len(words) or (states != 2**16).any():
		raise ValueError("its code does not end where it should")
	return symbols


MAGIC = b"GPT16MB2"
NAMES = list(SETTINGS)
LOCAL_SETTINGS = {"data_path", "tokenizer_path", "run_id", "artifact_path", "artifact_limit", "eval_only"}


def pack_artifact(s, fingerprint, stored):
	"""Magic; SHA-256 of the rest; the length, 4 bytes, of an .npz file as xz stream; that; the rANS code of all integers +
	MOST. The .npz file: `header` (JSON), quantize()'s fp16, contexts as NAME.rows, `frequency` by context."""
	matrices = {name: q.cpu() for name, q in stored.items() if q.dtype == torch.int16}
	halves = {name: t.cpu().numpy() for name, t in stored.items() if name not in matrices}
	rows = {name + ".rows": row_contexts(q).numpy() for name, q in matrices.items()}
	columns = {name: q.size(-1) for name, q in matrices.items()}
	counts = count_integers(matrices).numpy()
	counts[counts.sum(axis=1) == 0, 0] = 1
	frequency = frequencies(counts)
	contexts = np.concatenate([np.repeat(row, q.size(-1)) for row, q in zip(rows.values(), matrices.values())])
	code = rans_encode(frequency, contexts, np.concatenate([(q + MOST).numpy().ravel() for q in matrices.values()]))
	settings = {name: show(getattr(s, name)) for name in NAMES if name not in LOCAL_SETTINGS}
	header = json.dumps(dict(tokenizer=fingerprint, settings=settings, columns=columns)).encode()
	file = io.BytesIO()
	np.savez(file, header=np.frombuffer(header, np.uint8), frequency=frequency.astype(np.uint16), **rows, **halves)
	side = lzma.compress(file.getvalue(), preset=9)
	packed = len(side).to_bytes(4, "little") + side + code
	return MAGIC + hashlib.sha256(packed).digest() + packed


def unpack_artifact(data, path):
	"""(tokenizer fingerprint, settings, what quantize() gave); executes nothing. Raises RunError."""
	if not data.startswith(MAGIC) or hashlib.sha256(data[40:]).digest() != data[8:40]:
		raise RunError(f"artifact {path}: truncated, altered or no artifact")
	try:
		end, at = 44 + int.from_bytes(data[40:44], "little"), 0
		with np.load(io.BytesIO(lzma.decompress(data[44:end])), allow_pickle=False) as file:
			arrays = {name: file[name] for name in file.files}
		header = json.loads(bytes(arrays.pop("header")))
		settings = {name: parse_value(name.upper(), str(text)) for name, text in header["settings"].items()}
		if settings.keys() != set(NAMES) - LOCAL_SETTINGS:
			raise ValueError("it has other settings")
		rows = {name: arrays.pop(name + ".rows") for name in header["columns"]}
		contexts = np.concatenate([np.repeat(row, n) for row, n in zip(rows.values(), header["columns"].values())])
		symbols = rans_decode(arrays.pop("frequency").astype(np.uint64), contexts, data[end:]).astype(np.int16) - MOST
		for name, row in rows.items():
			n = row.size * header["columns"][name]
			arrays[name], at = symbols[at:at + n].reshape(*row.shape, -1), at + n
		return header["tokenizer"], settings, {name: torch.from_numpy(a) for name, a in arrays.items()}
	except Exception as e:
		raise RunError(f"artifact {path}: not of this version's format ({e})") from None


# ---- Scoring ----

def plan_windows(targets, window, stride):
	"""Windows that score each target (token i + 1) once, (n, 3): start of inputs, begin and end of targets. The first
	scores all, each later one its last `stride`, one more what is left."""
	window = min(window, targets)
	end = F.pad(torch.arange(window, targets, stride), (0, 1), value=targets)
	return torch.stack((end - window, F.pad(end[:-1], (1, 0)), end), dim=1)


class Score(NamedTuple):
	nats: float = 0
	tokens: float = 0
	bytes: float = 0
	val_loss = property(lambda self: self.nats / max(self.tokens, 1))
	val_bpb = property(lambda self: self.nats / math.log(2) / max(self.bytes, 1))

	def __add__(self, other):
		return Score(*map(sum, zip(self, other)))


class Scorer:
	"""Scores windows of tokens (N + 1,) int32, which lie, like the byte tables, on the model's device."""

	def __init__(self, model, tokens, tables, window, batch_tokens):
		self.model, self.tokens, self.tables, self.targets = model, tokens, tables, len(tokens) - 1
		self.window = min(window, self.targets)
		self.batch = max(1, batch_tokens // self.window)

	@torch.no_grad()
	def score(self, plan, progress=lambda done: None):
		"""The Score of a plan, shared out over the ranks. Batches have one shape: windows that score nothing fill up."""
		low, high = share(len(plan))
		batch = self.batch if self.tokens.is_cuda else max(1, min(self.batch, high - low))
		plan = F.pad(plan[low:high], (0, 0, 0, (low - high) % batch)).to(self.tokens.device)
		sums, matrices = torch.zeros(3, dtype=torch.float64, device=plan.device), self.model.matrices()
		for i in range(0, len(plan), batch):
			start, begin, end = plan[i:i + batch, :, None].unbind(1)
			at = start + torch.arange(self.window, device=plan.device)
			x, y = self.tokens[at].long(), self.tokens[at + 1].long()
			scored = (begin <= at) & (at < end)
			nll = self.model(x, y, matrices).double()
			size = self.tables.count(x, y) if self.tables else nll
			sums += torch.stack([(per_token * scored).sum() for per_token in (nll, scored, size)])
			progress((i + batch) / len(plan))
		return Score(*all_reduce(sums).tolist())

	def score_all(self, stride, stage="scoring"):
		return self.score(plan_windows(self.targets, self.window, stride), progress_of(stage))


# ---- Test-time training ----

def chunk_epochs(s, val_loss, late):
	change = (val_loss > s.ttt_entropy_high and not late) - (0 < val_loss < s.ttt_entropy_low)
	return max(s.ttt_epochs + change * s.ttt_entropy_adapt, 1)


class Learner:
	def __init__(self, model, s):
		self.model, self.s, self.weights = model, s, list(model.parameters())
		self.sgd = None if s.ttt_muon else torch.optim.SGD(self.weights, momentum=s.ttt_momentum)

	def learn(self, tokens, epochs, lr):
		"""On the whole sequences in tokens (C + 1,), TTT_BATCH_SEQS an update over all ranks. Batches have one shape: a rank
		with fewer sequences adds some of weight zero."""
		T, size, W = self.s.train_seq_len, self.s.ttt_batch_seqs, world_size()
		sequences = (len(tokens) - 1) // T
		x, y = (t[:sequences * T].view(sequences, T).long() for t in (tokens, tokens[1:]))
		slot = rank() + W * torch.arange(-(-min(size, sequences) // W), device=tokens.device)
		for first in [*range(0, sequences, size)] * epochs:
			rows = min(size, sequences - first)
			row = (first + slot).clamp(max=sequences - 1)
			weight = (slot[:, None] < rows) / (rows * T)
			(self.model(x[row], y[row], self.model.matrices()) * weight).sum().backward()
			self.update(lr)

	@torch.no_grad()
	def update(self, lr):
		all_reduce_list([p.grad for p in self.weights])
		self.model.zero_frozen_gradients(self.s.ttt_freeze_blocks)
		if self.s.ttt_grad_clip:
			nn.utils.clip_grad_norm_(self.weights, self.s.ttt_grad_clip)
		if self.sgd:
			self.sgd.param_groups[0]["lr"] = lr
			self.sgd.step()
		else:
			for p in self.weights:
				p.sub_(newton_schulz(p.grad, self.s.ttt_ns_steps) if p.dim() >= 2 else p.grad, alpha=lr)
		self.model.zero_grad()


def score_first_ttt(scorer, learner, s, seconds=lambda: 0.0):
	"""Score chunk by chunk, each before the weights learn from it: (the whole Score, each chunk's (Score, epochs)). A
	window is of the chunk of its first target. seconds(): how long the evaluation has run."""
	C, total, records, start = s.ttt_chunk_tokens, Score(), [], time.perf_counter()
	chunks, plan = -(-scorer.targets // C), plan_windows(scorer.targets, scorer.window, s.eval_stride)
	for c, part in enumerate(plan.split((plan[:, 1] // C).bincount(minlength=chunks).tolist())):
		score, epochs = scorer.score(part), 0
		total += score
		if c < chunks - 1:
			epochs = chunk_epochs(s, score.val_loss, late=from_rank0(seconds()) > 0.85 * s.eval_time_soft_cap_seconds)
			lr = s.ttt_lr * (1 + math.cos(math.pi * c / (chunks - 1))) / 2
			learner.learn(scorer.tokens[c * C:(c + 1) * C + 1], epochs, lr)
		records.append((score, epochs))
		if c % -(-chunks // 20) == 0 or c == chunks - 1:
			log(f"ttt_chunk [{c + 1}/{chunks}] bpb={total.val_bpb:.6f} time={time.perf_counter() - start:.1f}s")
	return total, records


# ---- Training ----

class Trainer:
	def __init__(self, s, device, attention, dtype):
		self.s, self.device, self.steps = s, device, None
		shards, holdout = split_holdout(open_shards(s.data_path, "train"), s.holdout_tokens, s.train_seq_len)
		holdout = check_ids(holdout, s.vocab_size, "held-out tail of the last train shard").to(device)
		self.shards, self.batches = shards, lambda: batches(shards, s.train_batch_tokens // 8, s.vocab_size)
		torch.manual_seed(s.seed)
		self.model = GPT(s, attention, dtype).initialize().to(device).compile_on_cuda()
		self.weights = list(self.model.parameters())
		self.optimizers = Optimizers(self.model, s)
		self.holdout = Scorer(self.model, holdout, None, s.train_seq_len, s.val_batch_size // 8)

	def step(self, spans, multiplier, momentum):
		"""On spans (8 / W, span + 1): (this rank's part of the mean loss, gradient norm), on the device. The banks are
		rounded and cast once for all micro-batches."""
		s, spans = self.s, spans.to(self.device, non_blocking=True).long()
		rows = max(1, (s.micro_batch_tokens or s.train_batch_tokens // 8) // s.train_seq_len)
		x, y = (t.reshape(-1, s.train_seq_len).split(rows) for t in (spans[:, :-1], spans[:, 1:]))
		matrices, loss = self.model.matrices(self.steps), torch.zeros((), device=self.device)
		for batch in zip(x, y):
			part = self.model(*batch, matrices).sum() / s.train_batch_tokens
			part.backward()
			loss += part.detach()
		return torch.stack((loss, self.optimizers.step(multiplier, momentum)))

	def calibrate(self):
		return calibrate(self.model, self.holdout.tokens, self.s.train_seq_len)

	def fix_steps(self, fisher, limit):
		"""From now on, such that the artifact should fit `limit` bytes."""
		self.base = base_steps(self.s, self.model, fisher)
		size = lambda knob: estimate_bytes(quantize(self.s, self.model.state_dict(), scaled(self.s, self.base, knob)))
		self.knob = from_rank0(fit_knob(self.s, self.model, size, limit, self.s.matrix_step))
		self.steps = scaled(self.s, self.base, self.knob)

	def holdout_loss(self):
		return self.holdout.score_all(self.s.train_seq_len).val_loss

	def warm_up(self):
		"""Compile, undo the steps. Returns the ms to keep for average and calibration."""
		spans, ms = self.batches(), 0
		with undone(self.weights):
			for _ in range(self.s.warmup_steps):
				self.step(together(lambda: next(spans)), 1.0, self.s.muon_momentum)
		self.optimizers = Optimizers(self.model, self.s)
		for action, times in ((self.holdout_loss, 4), (self.calibrate, 1.5)):
			action()  # the first time compiles
			start = time.perf_counter()
			action()
			ms += 1000 * times * (time.perf_counter() - start)
		return from_rank0(ms)

	def run(self, validate, artifact_limit):
		"""Train, leave the weights to export in the model, return GPTQ's moments. validate() scores the current weights.
		Rank 0's clock is everyone's; reading it, with loss and norm, is a step's only wait for the device."""
		s, step, elapsed_ms, start = self.s, 0, 0.0, time.perf_counter()
		reserve_ms = self.warm_up()
		log(f"warm-up took {time.perf_counter() - start:.1f}s; {reserve_ms:.0f}ms are kept for average and calibration")
		budget_ms = 1000 * s.max_wallclock_seconds - reserve_ms if s.max_wallclock_seconds else math.inf
		averages, spans, progress = WeightAverages(self.weights, s), self.batches(), progress_of("training")
		start = time.perf_counter()
		while True:
			mean_ms = elapsed_ms / max(step, 1)
			last = step == s.iterations or step > 0 and elapsed_ms + mean_ms > budget_ms
			status = f"step:{step}/{s.iterations} %s train_time:{elapsed_ms:.0f}ms step_avg:{mean_ms:.2f}ms"
			if 0 < step and s.train_log_every and (step <= 10 or step % s.train_log_every == 0):
				log(status % f"train_loss:{loss:.4f}")
			if last or s.val_loss_every and step % s.val_loss_every == 0:
				pause, score = time.perf_counter(), validate()
				log(status % f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}")
				start += time.perf_counter() - pause
			if last:
				break
			multiplier = lr_multiplier(step, s, elapsed_ms, budget_ms)
			if s.late_qat and step and multiplier < s.late_qat_threshold and not self.steps:
				self.fix_steps(self.calibrate()[1], artifact_limit)
				log(f"late QAT from step {step}, {self.knob:.3f} times the record's steps")
			measured = self.step(together(lambda: next(spans)), multiplier, muon_momentum(step, s))
			averages.update(step, multiplier)
			step += 1
			loss, norm = measured.tolist()
			now = [1000 * (time.perf_counter() - start) * (rank() == 0), loss, norm / world_size()]
			elapsed_ms, loss, norm = all_reduce(torch.tensor(now, dtype=torch.float64)).tolist()
			if not math.isfinite(loss + norm):
				raise RunError(f"step {step}: loss {loss}, gradient norm {norm}; lower the learning rates")
			progress(max(step / s.iterations, elapsed_ms / budget_ms))
		self.choose(averages.candidates())
		moments, fisher = self.calibrate()
		if not self.steps:
			self.fix_steps(fisher, artifact_limit)
		log(f"training: {step} steps in {elapsed_ms:.0f}ms, {1000 * (time.perf_counter() - start):.0f}ms with average and "
			f"calibration; peak memory {peak_memory()}")
		return moments

	def choose(self, candidates):
		"""The average of least loss on held-out training tokens. Raises RunError if none is finite."""
		losses = {}
		for name, weights in candidates.items():
			copy_weights(self.weights, weights)
			loss = self.holdout_loss()
			losses[name] = loss if math.isfinite(loss) else math.inf
			log(f"weight_average:{name} holdout_loss:{loss:.6f}")
		best = min(losses, key=losses.get)
		if losses[best] == math.inf:
			raise RunError("no held-out loss is finite; lower the learning rates")
		copy_weights(self.weights, candidates[best])
		log(f"weight_average chosen:{best}")


# ---- Main ----

def peak_memory():
	resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
	return f"{(torch.cuda.max_memory_allocated() or resident) / 2**20:.0f} MiB"


def export(s, fingerprint, trainer, moments, limit):
	"""The artifact, by another knob than training's if that misses the limit."""
	start, made, weights = time.perf_counter(), {}, trainer.model.state_dict()
	factors = {name: factor(m) for name, m in moments.items()} if s.quantizer == "gptq" else {}

	def size(knob):
		made[0] = pack_artifact(s, fingerprint, quantize(s, weights, scaled(s, trainer.base, knob), factors))
		return len(made[0])

	knob = fit_knob(s, trainer.model, size, limit, trainer.knob)
	log(f"quantized by {s.quantizer} in {time.perf_counter() - start:.1f}s, {knob:.3f} times the record's steps")
	return made[0]


def evaluate(stages):
	"""Report the Score of each stage."""
	for name, stage in stages.items():
		start, score = time.perf_counter(), stage()
		log(f"{name} eval_time:{1000 * (time.perf_counter() - start):.0f}ms, peak memory {peak_memory()}")
		log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")


def run(s):
	global newton_schulz
	device = start_processes()
	cuda = device.type == "cuda"
	if cuda:
		torch._dynamo.config.recompile_limit = 64
		newton_schulz = torch.compile(newton_schulz, dynamic=False, fullgraph=True)
	s.run_id = from_rank0(s.run_id or str(uuid.uuid4()))
	path, source = Path(s.artifact_path or f"logs/{s.run_id}.bin"), Path(__file__).read_text(encoding="utf-8")
	limit = s.artifact_limit - len(source.encode())
	together(lambda: open_outputs(Path(f"logs/{s.run_id}.txt"), None if s.eval_only else path, source))

	def read_artifact():
		data = from_rank0(together(lambda: path.read_bytes() if rank() == 0 else None))
		return len(data), *unpack_artifact(data, path)

	if s.eval_only:
		size, made_with, kept, stored = read_artifact()
		s = parse_settings(os.environ, kept | dict(run_id=s.run_id))
		for name in NAMES[NAMES.index("num_layers"):NAMES.index("matrix_lr")]:
			if getattr(s, name) != kept[name]:
				raise RunError(f"{name.upper()}={show(getattr(s, name))}, but the artifact has {show(kept[name])}")
	log("settings: " + " ".join(f"{name.upper()}={show(getattr(s, name))}" for name in SETTINGS))
	(kernel, attention), dtype = choose_attention(device), torch.bfloat16 if cuda else torch.float32
	hardware = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
	log(f"{world_size()} x {hardware}, attention: {kernel}, torch {torch.__version__}, Python {platform.python_version()}")
	tokenizer, fingerprint = together(lambda: load_tokenizer(s.tokenizer_path, s.vocab_size))
	tables = ByteTables(*(t.to(device) for t in byte_tables(tokenizer)))
	tokens = together(lambda: validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len)).to(device)
	scorer_of = lambda model, tokens: Scorer(model, tokens, tables, s.eval_seq_len, s.val_batch_size // 8)
	if not s.eval_only:
		trainer = together(lambda: Trainer(s, device, attention, dtype))
		scorer = scorer_of(trainer.model, tokens)
		log(f"{sum(w.numel() for w in trainer.weights)} parameters; tokens: {len(tokens)} for validation, "
			f"{sum(map(len, trainer.shards))} for training, {len(trainer.holdout.tokens)} held out")
		moments = trainer.run(lambda: scorer.score_all(s.eval_seq_len), limit)
		evaluate(dict(averaged=lambda: scorer.score_all(s.eval_seq_len)))
		together(lambda: write_atomically(path, export(s, fingerprint, trainer, moments, limit)) if rank() == 0 else None)
		size, made_with, _, stored = read_artifact()
	log(f"Total submission size int+rans: {size + len(source.encode())} bytes")
	if made_with != fingerprint:
		raise RunError(f"artifact {path}: made with another tokenizer than {s.tokenizer_path}")
	model = GPT(s, attention, dtype)
	try:
		model.load_state_dict(dequantize(stored))
	except RuntimeError:
		raise RunError(f"artifact {path}: its tensors are not those of its settings") from None
	model, start = model.to(device).compile_on_cuda(), time.perf_counter()
	if cuda:  # compile, on made-up tokens and without a trace
		made_up = torch.randint_like(tokens[:max(s.ttt_chunk_tokens, s.eval_seq_len) + 1], s.vocab_size)
		with undone(list(model.parameters())):
			scorer_of(model, made_up).score_all(s.eval_seq_len)
			Learner(model, s).learn(made_up[:s.ttt_chunk_tokens + 1], int(s.ttt_enabled), 0.0)
		log(f"compiled scoring and TTT in {time.perf_counter() - start:.1f}s")
	scorer = scorer_of(model, tokens)
	stages = dict(final_int6_roundtrip=lambda: scorer.score_all(s.eval_seq_len, "roundtrip"),
			final_int6_sliding_window=lambda: scorer.score_all(s.eval_stride, "sliding"))
	if s.ttt_enabled:
		stages["legal_ttt"] = lambda: score_first_ttt(scorer, Learner(model, s), s, lambda: time.perf_counter() - start)[0]
	evaluate(stages)
	if size > limit:
		raise RunError(f"submission {size - limit} bytes over ARTIFACT_LIMIT={s.artifact_limit}; {path} is kept")


def main():
	status = 0
	try:
		if sys.argv[1:] == ["--help"]:
			print(help_text())
		elif sys.argv[1:]:
			raise RunError(f"unknown argument {sys.argv[1]}, see --help")
		else:
			run(parse_settings(os.environ))
	except RunError as e:
		who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
		print(f"train_gpt.py: {who}error: {e}", file=sys.stderr, flush=True)
		status = 2
	if dist.is_initialized():
		dist.destroy_process_group()
	return status


if __name__ == "__main__":
	sys.exit(main())
