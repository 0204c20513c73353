"""Which files of a cache commit which others, told by their names and by the bytes of a commit."""

from distilllens_cache import layout
from distilllens_cache.errors import CacheError
from distilllens_cache.manifest import FileRecord, Manifest, Sidecar, SketchCommit, from_bytes


def is_own(name: str) -> bool:
    """Whether a writer of caches makes files of this name that are part of a cache."""
    if name.startswith(f"{layout.TOKENIZER}/"):
        return layout.is_safe_name(name)
    is_own = layout.OWN_FILE.fullmatch(name) is not None and name != layout.CALIBRATION
    return is_own and layout.TEMPORARY.fullmatch(name) is None


def commits_of(manifest: Manifest) -> list[str]:
    """The sidecars and the commits of sketches of a finished cache."""
    sidecars = [layout.sidecar_name(number) for number in range(len(manifest.shards))]
    return [*sidecars, *(layout.sketch_commit_name(layer) for layer in manifest.sketches)]


def committed_by(name: str) -> tuple[str, ...]:
    """The files that the sidecar of a shard or the commit of a sketch called ``name`` may name; none otherwise."""
    folder, _, file = name.partition("/")
    if not is_own(name) or not file.endswith(".json") or folder not in (layout.SHARDS, layout.SKETCHES):
        return ()
    stem = name.removesuffix(".json")
    others = (".tails.arrow", ".tail_rows.arrow") if folder == layout.SHARDS else (".projection.arrow",)
    return tuple(f"{stem}{end}" for end in (".arrow", *others))


def records_of(commit: str, data: bytes) -> list[FileRecord] | None:
    """The records of the files that a sidecar, or the commit of a sketch, commits; None if it makes no sense."""
    try:
        if commit.startswith(f"{layout.SHARDS}/"):
            records: list[FileRecord] = from_bytes(Sidecar, data, name=commit).shard.files
        else:
            sketch = from_bytes(SketchCommit, data, name=commit).sketch
            records = [sketch.sketch, sketch.projection]
    except CacheError:
        return None
    return records if {record.name for record in records} <= set(committed_by(commit)) else None
