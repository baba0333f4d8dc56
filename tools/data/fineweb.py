"""Download the published FineWeb shards and their tokenizer.

    python -m tools.data.fineweb                    # 80 training shards, all of validation, the tokenizer
    python -m tools.data.fineweb --train-shards 1   # enough for a trial run
    python -m tools.data.fineweb --variant sp8192   # for RECIPE=frontier; sp4096 is published, too

Needs `pip install huggingface_hub`, which takes a mirror from HF_ENDPOINT and a token from HF_TOKEN. A file
gets its final name only when it is complete and valid, and is not downloaded again after that: to go on after
an interruption, run the same command again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from tools.common.cli import ROOT, Parser, ends_in_one_line, fail
from tools.common.shards import count_bytes, state
from train_gpt import RunError, Shard, byte_tables, check_ids, load_tokenizer, open_shards

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REMOTE = "datasets/"  # the repository's folder that is laid out like --out
PUBLISHED = ("willdepueoai/parameter-golf", "kevclark/parameter-golf")  # of sp1024; of larger ones
# Tokens of validation by variant, and MB of its text, which is the same 50,000 documents in all of them (the
# challenge's README and logs)
VALIDATION_TOKENS = {"sp1024": 62_021_633}
VALIDATION_MB = 151.08
STAGING = ".download"  # beside the final files, so that giving a file its name is one rename


@contextmanager
def one_line_errors(action: str, endpoint: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises (the types differ between its versions) into a RunError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"cannot {action} from {endpoint}: {reason[:300]}; running again resumes") from error


def choose_shards(paths: Iterable[str], variant: str) -> tuple[list[str], list[str]]:
    """Returns the (training, validation) shards of `variant` among the repository's `paths`, each in name
    order.

    Raises RunError for an unknown variant and for one without validation shards.
    """
    folder = f"{REMOTE}datasets/fineweb10B_{variant}/"
    if not any(path.startswith(folder) for path in paths):
        known = {
            found[1] for path in paths if (found := re.match(rf"{REMOTE}datasets/fineweb10B_([^/]+)/", path))
        }
        raise RunError(f"no variant {variant!r}; available: {', '.join(sorted(known)) or 'none'}")
    train = sorted(path for path in paths if fnmatchcase(path, f"{folder}fineweb_train_*.bin"))
    val = sorted(path for path in paths if fnmatchcase(path, f"{folder}fineweb_val_*.bin"))
    if not val:
        raise RunError(f"variant {variant!r} has no validation shard ({folder}fineweb_val_*.bin)")
    return train, val


def read_entries(manifest: str) -> dict[str, dict]:
    """Returns the objects of a manifest's JSON text by their name; nothing of a text that is none."""
    entries = {}
    with suppress(ValueError):
        json.loads(manifest, object_hook=lambda item: entries.update({str(item.get("name")): item}) or item)
    return entries


def check_counts(manifest: str, variant: str, train: list[str], val: list[str]) -> None:
    """Raises RunError if the manifest counts other shards of the variant than the repository has."""
    stats = read_entries(manifest).get(f"fineweb10B_{variant}", {}).get("stats")
    for name, found in (("files_train", train), ("files_val", val)):
        stated = stats.get(name) if isinstance(stats, dict) else None
        if isinstance(stated, int) and stated != len(found):
            raise RunError(f"variant {variant!r}: the manifest has {name} {stated}, the Hub {len(found)}")


def choose_tokenizer(paths: Iterable[str], variant: str, manifest: str) -> str:
    """Returns the SentencePiece model of `variant` among the repository's `paths`.

    `manifest` is JSON text: the entry named like the data set decides, where it gives a .model file or the
    name of an entry that does. Otherwise the file's own name does: fineweb_1024_bpe.model. Raises RunError if
    there is none.
    """
    entries = read_entries(manifest)
    entry = entries.get(f"fineweb10B_{variant}", {})
    related = [
        entry,
        *(entries[value] for value in entry.values() if isinstance(value, str) and value in entries),
    ]
    listed = re.findall(r'([^"/]+\.model)"', json.dumps(related))
    models = {path.rpartition("/")[2]: path for path in paths if path.endswith(".model")}
    for name in [*listed, f"fineweb_{variant.removeprefix('sp')}_bpe.model"]:
        if name in models:
            return models[name]
    raise RunError(
        f"no SentencePiece model is published for variant {variant!r}, only {', '.join(models) or 'none'}"
    )


def read_catalog(api: "HfApi", source: dict) -> tuple[dict[str, int], str, dict]:
    """Returns (size in bytes of each path, text of the manifest, source pinned to one commit).

    `source` holds repo_id, repo_type and revision. Raises RunError if the Hub does not answer.
    """
    with one_line_errors(f"list {source['repo_id']}", api.endpoint):
        info = api.dataset_info(source["repo_id"], revision=source["revision"], timeout=30)
        source = {**source, "revision": info.sha or source["revision"]}
        tree = api.list_repo_tree(path_in_repo=REMOTE.rstrip("/"), recursive=True, **source)
        sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        manifest = f"{REMOTE}manifest.json"
        text = Path(api.hf_hub_download(filename=manifest, **source)).read_text() if manifest in sizes else ""
    return sizes, text, source


def fault(path: Path, size: int) -> str:
    """Returns a line on what is wrong with a file, "" if it has `size` bytes and, being a shard, opens."""
    found = path.stat().st_size if path.exists() else 0
    if found != size:
        return f"{path}: {found} bytes instead of {size}"
    try:
        if path.suffix == ".bin":
            Shard(path)
    except RunError as error:
        return str(error)
    return ""


def fetch(api: "HfApi", source: dict, remote: str, size: int, target: Path) -> None:
    """Download `remote` to `target`, which appears only once it is valid; a damaged file is tried once more.

    Raises RunError if the download fails or is damaged twice.
    """
    for attempt in range(2):
        with one_line_errors(f"download {target.name}", api.endpoint):
            staged = Path(
                api.hf_hub_download(
                    filename=remote, local_dir=target.parent / STAGING, force_download=attempt > 0, **source
                )
            )
        damage = fault(staged, size)
        if not damage:
            staged.replace(target)
            return
        staged.unlink()
    raise RunError(f"{target.name} from {api.endpoint} was damaged twice and is not kept: {damage}")


def download(
    api: "HfApi", source: dict, variant: str, train_shards: int, out: Path
) -> tuple[Path, int, int, int]:
    """Complete the folder `out`; return (tokenizer, number of training and of validation shards, bytes)."""
    sizes, manifest, source = read_catalog(api, source)
    train, val = choose_shards(sizes, variant)
    check_counts(manifest, variant, train, val)
    if len(train) < train_shards:
        print(f"{train_shards} training shards asked for, {len(train)} published: taking all")
    train, tokenizer = train[:train_shards], choose_tokenizer(sizes, variant, manifest)
    targets = {remote: out / remote.removeprefix(REMOTE) for remote in [*val, *train, tokenizer]}
    missing = {remote: why for remote, target in targets.items() if (why := fault(target, sizes[remote]))}
    for remote, why in missing.items():
        if targets[remote].exists():
            print(f"downloading again: {why}")
    folder = targets[val[0]].parent
    folder.mkdir(parents=True, exist_ok=True)
    total, free = sum(sizes[remote] for remote in missing), shutil.disk_usage(folder).free
    if total > free:
        raise RunError(
            f"{total / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free in {out}: lower --train-shards"
        )
    print(
        f"{len(targets) - len(missing)} of {len(targets)} files present, {total / 1e9:.2f} GB to go",
        flush=True,
    )

    start, done = time.perf_counter(), 0
    for count, remote in enumerate(missing, 1):
        begin, size, name = time.perf_counter(), sizes[remote], targets[remote].name
        fetch(api, source, remote, size, targets[remote])
        end, done = time.perf_counter(), done + size
        rate, left = size / 1e6 / (end - begin), (end - start) * (total - done) / max(done, 1)
        print(
            f"[{count}/{len(missing)}] {name} {size / 1e6:.1f} MB, {rate:.1f} MB/s, {left:.0f} s left",
            flush=True,
        )
    for target in targets.values():
        shutil.rmtree(target.parent / STAGING, ignore_errors=True)
    return targets[tokenizer], len(train), len(val), sum(sizes[remote] for remote in targets)


def state_totals(folder: Path, tokenizer: Path, variant: str, published: bool) -> str:
    """Write what validation holds, for runs to check, and return it in words.

    Raises RunError, also for what is `published` but not FineWeb's validation text, OSError.
    """
    shards = open_shards(str(folder), "val")
    vocab_size = int(variant.removeprefix("sp"))
    for shard in shards:
        check_ids(shard.read(), vocab_size, str(shard.path))
    tables = byte_tables(load_tokenizer(str(tokenizer), vocab_size)[0])
    tokens, size = sum(map(len, shards)), count_bytes(shards, tables)
    found = f"{tokens:,} tokens of validation, {size / 1e6:.2f} MB of text"
    known = VALIDATION_TOKENS.get(variant, tokens)
    if published and (tokens != known or round(size / 1e6, 2) != VALIDATION_MB):
        raise RunError(f"{folder}: {found}; FineWeb has {known:,} tokens, {VALIDATION_MB} MB: fetch it again")
    state(folder, tokens=tokens, bytes=size)
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = Parser(__doc__)
    parser.add_argument("--variant", default="sp1024", help="tokenization (default sp1024)")
    parser.add_argument(
        "--train-shards", type=int, default=80, metavar="N", help="the first N, or 0 (default 80)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data"), metavar="DIR", help="destination (default ./data)"
    )
    parser.add_argument("--repo", help="dataset repository on the Hub (the challenge's that has the variant)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default main)")
    args = parser.parse_args(argv)
    if args.train_shards < 0:
        parser.error("--train-shards must be 0 or more")
    args.repo = args.repo or PUBLISHED[args.variant != "sp1024"]
    return args


def main(argv: list[str] | None = None) -> None:
    """Download what the arguments ask for."""
    args = parse_arguments(argv)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        fail(f"{error}; pip install -r tools/requirements.txt")
    disable_progress_bars()
    source = {"repo_id": args.repo, "repo_type": "dataset", "revision": args.revision}
    with ends_in_one_line():
        tokenizer, train, val, size = download(HfApi(), source, args.variant, args.train_shards, args.out)
        folder = args.out / "datasets" / f"fineweb10B_{args.variant}"
        print(state_totals(folder, tokenizer, args.variant, args.repo in PUBLISHED))
    settings = {
        "DATA_PATH": folder,
        "TOKENIZER_PATH": tokenizer,
        "VOCAB_SIZE": args.variant.removeprefix("sp"),
    }
    command = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in settings.items())
    print(f"{train} training and {val} validation shards, {size / 1e9:.2f} GB in {args.out}. To train:")
    print(f"{command} torchrun --standalone --nproc_per_node=gpu {os.path.relpath(ROOT / 'train_gpt.py')}")


if __name__ == "__main__":
    main()
