"""What a cache's files are called, and which names are safe to open."""

import re

FORMAT_VERSION = 1
"""Version of the format that this package writes and reads."""

PLAN = "plan.json"
INDEX = "index.arrow"
TOKENIZER = "tokenizer"
SHARDS = "shards"
TAIL_SUMS = "tail_sums.arrow"
SKETCHES = "sketches"
CALIBRATION = "calibration.bin"
MANIFEST = "manifest.json"
DOOR = "writers.lock"
CARD = "README.md"
"""A dataset card beside the cache, which is for people. No part of it: only what a kill left of one is cleared."""
CONFIG = "config.resolved.yaml"
"""The settings that a pass resolved, beside the cache as the card is."""
REMOTE_LOCK = "remote.lock"

MAX_SHARD_BYTES = 1 << 30
"""Largest file of targets or of tail rows, in bytes. A reader digests a whole shard before it parses it."""
MAX_DECODED_BYTES = 4 << 30
"""Most memory, in bytes, that one Arrow file of a cache may declare for its buffers."""
MAX_JSON_BYTES = 256 << 20
"""Largest plan or manifest, in bytes."""
MAX_SIDECAR_BYTES = 1 << 20
"""Largest sidecar, in bytes."""
MAX_CALIBRATION_BYTES = 1 << 30
"""Largest scratch file of a calibration pass, in bytes."""
MAX_FILE_BYTES = 4 << 30
"""Largest of the other files (index, tail sums, sketches, tokenizer), in bytes."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9._+\-]*"
SAFE_NAME = re.compile(rf"{_PART}(/{_PART}){{0,3}}", re.ASCII)
"""A relative path of plain parts: never absolute, no `.` or `..`, no backslash, nothing hidden."""

OWN_FILE = re.compile(
    rf"({re.escape(PLAN)}|{re.escape(MANIFEST)}|{re.escape(INDEX)}|{re.escape(TAIL_SUMS)}|{re.escape(CALIBRATION)}"
    rf"|{SHARDS}/\d{{5,}}(\.arrow|\.tails\.arrow|\.tail_rows\.arrow|\.json)"
    rf"|{SKETCHES}/layer_\d+(\.arrow|\.projection\.arrow|\.json))(\.tmp-\d+)?"
    rf"|({re.escape(CARD)}|{re.escape(CONFIG)})\.tmp-\d+",
    re.ASCII,
)
"""Files outside the tokenizer's folder that only a writer of caches makes."""

SEAT = re.compile(r"writer\.(\d+)\.lock", re.ASCII)
"""Files that the writers at work hold; none is part of a cache."""

TEMPORARY = re.compile(r".*\.tmp-\d+", re.ASCII)


def shard_name(number: int) -> str:
    """File of the targets of shard ``number``."""
    return f"{SHARDS}/{number:05d}.arrow"


def tails_name(number: int) -> str:
    """File of the tail sums of shard ``number``."""
    return f"{SHARDS}/{number:05d}.tails.arrow"


def tail_rows_name(number: int) -> str:
    """File of what shard ``number`` stores of the tail of each target."""
    return f"{SHARDS}/{number:05d}.tail_rows.arrow"


def sidecar_name(number: int) -> str:
    """File that commits shard ``number``."""
    return f"{SHARDS}/{number:05d}.json"


def sketch_name(layer: int) -> str:
    """File of the sketch of ``layer``."""
    return f"{SKETCHES}/layer_{layer}.arrow"


def projection_name(layer: int) -> str:
    """File of what the codes of ``layer`` were computed with."""
    return f"{SKETCHES}/layer_{layer}.projection.arrow"


def sketch_commit_name(layer: int) -> str:
    """File that commits the sketch of ``layer``."""
    return f"{SKETCHES}/layer_{layer}.json"


def seat_name(rank: int) -> str:
    """File that the writer of this rank holds while it is at work."""
    return f"writer.{rank}.lock"


def is_lock(name: str) -> bool:
    """Whether this is a file by which writers keep others out."""
    return name == DOOR or SEAT.fullmatch(name) is not None


def limit_of(name: str) -> int:
    """Most bytes that an Arrow file of this name has."""
    is_shard = name.startswith(f"{SHARDS}/") and not name.endswith(".tails.arrow")
    return MAX_SHARD_BYTES if is_shard else MAX_FILE_BYTES


def is_safe_name(name: str) -> bool:
    """Whether ``name`` may be opened below a cache's folder."""
    return len(name) <= 240 and SAFE_NAME.fullmatch(name) is not None
