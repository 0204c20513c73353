"""Whether a folder's plan is the one of this run, or the beginning of it."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from distilllens_cache import folder as folder_state
from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain, read_recorded, record_of
from distilllens_cache.identity import Identity, compare_identity
from distilllens_cache.index import Index, index_bytes
from distilllens_cache.manifest import Manifest, Plan, from_bytes, to_bytes
from distilllens_cache.targets import PlannedExample

_ANEW = "Choose another --output-dir, or pass --overwrite to delete this cache and start anew."
_FIELDS_BUT_ROWS = [name for name in Identity.model_fields if name != "dataset_digest"]


def read_plan(folder: Path) -> Plan:
    """The plan in ``folder``; `CacheError` if there is none, or a damaged one."""
    data = read_plain(folder, layout.PLAN, max_bytes=layout.MAX_JSON_BYTES)
    return from_bytes(Plan, data, name=layout.PLAN)


def cut_of(folder: Path | str) -> list[range]:
    """The examples of each shard of the plan in ``folder``; none where there is no sound plan."""
    try:
        return [range(shard.first, shard.stop) for shard in read_plan(Path(folder)).shards]
    except CacheError:
        return []


def bytes_of(folder: Path) -> int:
    """Bytes of the finished cache whose manifest is in ``folder``; 0 where there is no sound manifest."""
    try:
        data = read_plain(folder, layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
        return from_bytes(Manifest, data, name=layout.MANIFEST).total_bytes
    except CacheError:
        return 0


def plan_digest(plan: Plan) -> str:
    """SHA-256 of the file of ``plan``: what shards and sketches name."""
    return hashlib.sha256(to_bytes(plan)).hexdigest()


def matching_plan(
    folder: Path, wanted: Plan, examples: Sequence[PlannedExample], *, append: bool, where: object = None
) -> Plan:
    """The plan in ``folder`` if it is ``wanted``; with ``append``, also if ``wanted`` only adds examples to its end.

    Everything else is a `CacheError` that names each difference, and calls the folder ``where`` if that is given.
    """
    where = folder if where is None else where
    found = _continued(folder, where)
    is_longer = append and found.num_examples < len(examples)
    # What the dataset holds is what an append changes, and its examples are compared one by one.
    fields = _FIELDS_BUT_ROWS if is_longer else list(Identity.model_fields)
    if compare_identity(found.identity, wanted.identity, fields):
        hint = _to_append(folder, found, wanted, examples)
        _require_identity(where, found, wanted.identity, fields, hint=hint)
    example = _differing_example(folder, found, wanted, examples, is_longer=is_longer)
    if example is not None:
        raise CacheError(f"{where} holds a cache of other examples: {example}. {_ANEW}")
    if found.shards != wanted.shards[: len(found.shards) if is_longer else None]:
        raise CacheError(
            f"{where} has {len(found.shards)} shards, cut elsewhere than the {len(wanted.shards)} of this run. {_ANEW}"
        )
    if found.tokenizer_files != wanted.tokenizer_files:
        raise CacheError(f"{where} has other tokenizer files than this run. {_ANEW}")
    return found


def require_writable(
    folder: Path, identity: Identity, *, overwrite: bool = False, append: bool = False, where: object = None
) -> None:
    """`CacheError` if a writer would refuse ``folder`` whatever its examples are. Nothing is changed.

    To be asked before the examples are made, where that is costly: all but their digest is compared. The error calls
    the folder ``where`` if that is given.
    """
    where = folder if where is None else where
    folder_state.check(folder)
    if overwrite:
        return
    folder_state.require_plan(folder, append=append, where=where)
    if (folder / layout.PLAN).exists():
        _require_identity(where, _continued(folder, where), identity, _FIELDS_BUT_ROWS)


def _continued(folder: Path, where: object) -> Plan:
    try:
        return read_plan(folder)
    except CacheError as error:
        raise CacheError(f"{where} cannot be continued: {error} {_ANEW}") from None


def _require_identity(where: object, found: Plan, wanted: Identity, fields: Collection[str], *, hint: str = "") -> None:
    if differences := compare_identity(found.identity, wanted, fields):
        lines = "\n  ".join(differences)
        raise CacheError(
            f"{where} holds a cache of something else:\n  {lines}\n{_ANEW} "
            f"To continue it, run with what it was made with{hint}."
        )


def _to_append(folder: Path, found: Plan, wanted: Plan, examples: Sequence[PlannedExample]) -> str:
    """What else a user may have wanted whose rows begin with those of the cache."""
    is_longer = found.num_examples < len(examples)
    if not is_longer or compare_identity(found.identity, wanted.identity, _FIELDS_BUT_ROWS):
        return ""
    is_other = _differing_example(folder, found, wanted, examples, is_longer=True) is not None
    return "" if is_other else "; the rows of this run begin with those of the cache: --append adds the others"


def _differing_example(
    folder: Path, found: Plan, wanted: Plan, examples: Sequence[PlannedExample], *, is_longer: bool
) -> str | None:
    same = examples[: found.num_examples]
    if found.num_examples != len(examples) and not is_longer:
        return f"it has {found.num_examples}, this run has {len(examples)}"
    # The file may be that of this run already, where the plan is not: compare what its bytes would be.
    if found.index == (record_of(layout.INDEX, index_bytes(same)) if is_longer else wanted.index):
        return None
    try:
        data = read_recorded(folder, found.index, max_bytes=layout.MAX_FILE_BYTES)
        index = Index(data, num_examples=found.num_examples)
    except CacheError as error:
        return f"its index differs from that of this run, and {error}"
    for number, example in enumerate(same):
        if index[number] != example:
            return f"at place {number} it has {index[number]}, this run has {example}"
    return None
