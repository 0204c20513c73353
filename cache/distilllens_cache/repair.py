"""What of a damaged cache can be put right from the cache itself: its plan, and the commits of its sketches."""

import hashlib
from itertools import accumulate
from pathlib import Path

from distilllens_cache import atomic, layout
from distilllens_cache.cache_folder import open_folder
from distilllens_cache.errors import CacheError
from distilllens_cache.files import read_plain
from distilllens_cache.manifest import Manifest, Plan, PlannedShard, SketchCommit, from_bytes, to_bytes
from distilllens_cache.reader import read_manifest
from distilllens_cache.resume import plan_digest

_ANEW = "Pass --overwrite instead of --repair to delete this cache and start anew."


def restore_plan(folder: Path) -> bool:
    """Write a missing or damaged plan again; whether that was necessary.

    The manifest of a finished cache says all that its plan said, and the digest of it. `CacheError` if the
    manifest is damaged too.
    """
    name = f"{layout.MANIFEST} in {folder}"
    found, damage = None, ""
    try:
        found = read_plain(folder, layout.PLAN, max_bytes=layout.MAX_JSON_BYTES)
        from_bytes(Plan, found, name=layout.PLAN)
    except CacheError as error:
        found, damage = None, str(error)
    try:
        manifest = from_bytes(Manifest, read_manifest(open_folder(folder)), name=name)
    except CacheError as error:
        if found is not None:
            return False
        raise CacheError(
            f"{folder} has nothing to be repaired from, since both are damaged: {damage} {error} {_ANEW}"
        ) from None
    if found is not None and hashlib.sha256(found).hexdigest() == manifest.plan_sha256:
        return False
    stops = list(accumulate(shard.num_examples for shard in manifest.shards))
    plan = Plan(
        identity=manifest.identity,
        index=manifest.index,
        tokenizer_files=manifest.tokenizer_files,
        shards=tuple(
            PlannedShard(name=shard.name, first=stop - shard.num_examples, stop=stop)
            for shard, stop in zip(manifest.shards, stops, strict=True)
        ),
    )
    data = to_bytes(plan)
    if hashlib.sha256(data).hexdigest() != manifest.plan_sha256:
        raise CacheError(f"{name} was not written for the plan that it describes. {_ANEW}")
    atomic.write_file(folder / layout.PLAN, data)
    return True


def restore_commits(folder: Path, plan: Plan) -> None:
    """Write missing or damaged commits of sketches again, as far as the manifest of ``plan`` is there to tell them.

    A sketch whose own file is damaged has to be fitted anew, and its commit tells to which examples.
    """
    try:
        manifest = from_bytes(Manifest, read_manifest(open_folder(folder)), name=layout.MANIFEST)
    except CacheError:
        return
    if manifest.plan_sha256 != plan_digest(plan):
        return
    for layer, record in manifest.sketches.items():
        name = layout.sketch_commit_name(layer)
        data = to_bytes(SketchCommit(plan_sha256=manifest.plan_sha256, layer=layer, sketch=record))
        try:
            is_whole = read_plain(folder, name, max_bytes=layout.MAX_SIDECAR_BYTES) == data
        except CacheError:
            is_whole = False
        if not is_whole:
            atomic.make_folder(folder / layout.SKETCHES)
            atomic.write_file(folder / name, data)
