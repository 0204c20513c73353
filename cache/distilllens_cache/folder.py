"""What lies in a folder: nothing, a cache to go on with, or something that is not ours."""

import os
from pathlib import Path

from distilllens_cache import atomic, layout
from distilllens_cache.errors import CacheError


def check(folder: Path) -> None:
    """Refuse a ``folder`` that is neither absent, empty nor a cache. Nothing is changed."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file; a cache is a folder. Choose another --output-dir.")
    if not folder.is_dir():
        return
    found = sorted(os.listdir(folder))
    if found and not looks_like_a_cache(folder):
        some = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise CacheError(
            f"{folder} holds something that is not a cache ({some}); nothing was changed. "
            f"Choose an empty or new --output-dir."
        )
    for name in (layout.SHARDS, layout.SKETCHES, layout.TOKENIZER):
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CacheError(f"{path} is no ordinary folder, as it is in a cache. Choose another --output-dir.")


def require_plan(folder: Path, *, append: bool = False, where: object = None) -> None:
    """Refuse a finished cache that lost its plan, without which everything else would be taken for rubbish.

    With ``append``, refuse also a folder without a cache. ``where`` is what a refusal calls the folder, if not so.
    """
    where = folder if where is None else where
    if os.path.lexists(folder / layout.PLAN):
        return
    if os.path.lexists(folder / layout.MANIFEST):
        raise CacheError(
            f"{where} has a {layout.MANIFEST} but no {layout.PLAN}; nothing was changed. --repair writes the plan "
            f"again, --overwrite deletes this cache and starts anew."
        )
    if append:
        raise CacheError(f"{where} holds no cache to add examples to: make it first, without --append.")


def clear(folder: Path, *, temporary_only: bool) -> None:
    """Delete what a writer of caches made in ``folder``, or only what a killed one left half-written.

    The manifest goes first, so that no reader takes what remains for a whole cache. The plan stays: it
    tells what the folder is until a new plan replaces it. Files that no writer makes stay too, and so do locks, which
    belong to the writers at work.
    """
    for path in _own_files(folder):
        is_temporary = layout.TEMPORARY.fullmatch(path.name) is not None
        if is_temporary or (not temporary_only and path != folder / layout.PLAN):
            atomic.remove(path)


def looks_like_a_cache(folder: Path) -> bool:
    """Whether a writer of caches was at work in ``folder``: a plan, a manifest, a first try at a plan, or a lock."""
    for name in (layout.PLAN, layout.MANIFEST):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if b'"distilllens-' in file.read(4 << 20) or file.seek(0, os.SEEK_END) == 0:
                    return True
    return all(name.startswith(f"{layout.PLAN}.tmp-") or layout.is_lock(name) for name in os.listdir(folder))


def _own_files(folder: Path) -> list[Path]:
    """Files that belong to a cache, the manifest first."""
    paths = [p for part in ("", layout.SHARDS, layout.SKETCHES) for p in (folder / part).glob("*")]
    own = [path for path in paths if layout.OWN_FILE.fullmatch(path.relative_to(folder).as_posix())]
    own += (folder / layout.TOKENIZER).rglob("*")
    files = [path for path in own if path.is_symlink() or path.is_file()]
    return sorted(files, key=lambda path: (path != folder / layout.MANIFEST, path))
