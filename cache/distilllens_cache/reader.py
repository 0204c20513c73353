"""The reader: a finished cache, checked before it is believed. It writes nothing and needs no network."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilllens_cache import layout
from distilllens_cache.cache_folder import CacheFolder, open_folder
from distilllens_cache.codec import find_codec
from distilllens_cache.errors import CacheError
from distilllens_cache.identity import READER_FIELDS
from distilllens_cache.index import Index
from distilllens_cache.manifest import Manifest, from_bytes
from distilllens_cache.shard import Expected, decode_shard
from distilllens_cache.sketch import Sketch, decode_sketch
from distilllens_cache.tail_rows import decode_tail_rows
from distilllens_cache.tail_sums import decode_tails
from distilllens_cache.targets import CachedExample


class CacheReader:
    """Examples and targets of a finished cache, by place in the plan.

    Opening reads the manifest and the index. Everything else is read when asked for, each file digested
    before it is parsed; whatever is wrong is a `CacheError` that names the file. Arrays are read-only,
    since examples are shared. Without ``tail_rows`` those files are not read, and targets have neither
    codes nor samples.

    ``folder`` is a path, or a URL of fsspec such as ``s3://bucket/cache``, whose files are spooled on this machine; for
    a spool other than the default, give ``open_folder(url, spool=Spool(folder, max_bytes))``.
    """

    def __init__(self, folder: Path | str | CacheFolder, *, shards_in_memory: int = 4, tail_rows: bool = True) -> None:
        self.folder = open_folder(folder)
        data = read_manifest(self.folder)
        self.digest = hashlib.sha256(data).hexdigest()
        """SHA-256 of the manifest, and so of everything it names."""
        self.manifest_bytes = len(data)
        """Bytes of the manifest."""
        self.manifest = from_bytes(Manifest, data, name=f"{layout.MANIFEST} in {self.folder}")
        for shard in self.manifest.shards:
            find_codec(shard.codec)
        stops = np.cumsum([shard.num_examples for shard in self.manifest.shards], dtype=np.int64)
        index_data = self.folder.read_recorded(self.manifest.index, max_bytes=layout.MAX_FILE_BYTES)
        self._index = Index(index_data, num_examples=self.manifest.num_examples)
        self.ids: list[str] = self._index.ids
        """(N,) names of the examples."""
        self.num_tokens: NDArray[np.int64] = self._index.num_tokens
        """(N,) tokens of each example."""
        self.num_targets: NDArray[np.int64] = self._index.num_targets
        """(N,) target positions of each example."""
        self.shard_of: NDArray[np.int64] = np.repeat(np.arange(len(stops)), np.diff(stops, prepend=0))
        """(N,) number of the shard that holds each example."""
        self._starts = np.concatenate([[0], stops])
        self._check_sums()
        self.tail_rows = tail_rows
        """Whether codes and samples are read; may be changed before the first example is."""
        self._shards_in_memory = max(1, shards_in_memory)
        self._decoded: dict[int, list[CachedExample]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> CachedExample:
        """The example at place ``index``, from 0. The shards used last stay decoded in memory."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {self.folder}, which has {len(self)}")
        number = int(self.shard_of[index])
        shard = self._decoded.pop(number, None)
        if shard is None:
            while len(self._decoded) >= self._shards_in_memory:
                del self._decoded[next(iter(self._decoded))]
            shard = self.read_shard(number)
        self._decoded[number] = shard
        return shard[index - int(self._starts[number])]

    def __iter__(self) -> Iterator[CachedExample]:
        """Every example in the order of the plan; one decoded shard in memory."""
        for number in range(len(self.manifest.shards)):
            yield from self.read_shard(number)

    def read_shard(self, number: int) -> list[CachedExample]:
        """The examples of one shard, read and checked anew."""
        if not 0 <= number < len(self.manifest.shards):
            raise IndexError(f"shard {number} of {self.folder}, which has {len(self.manifest.shards)}")
        record = self.manifest.shards[number]
        first, stop = int(self._starts[number]), int(self._starts[number + 1])
        expected = Expected(first, [self._index[place] for place in range(first, stop)])
        data = self.folder.read_recorded(record, max_bytes=layout.MAX_SHARD_BYTES)
        examples = decode_shard(data, expected, self.manifest.identity, find_codec(record.codec), name=record.name)
        if self.tail_rows:
            self.add_tail_rows(number, examples)
        return examples

    def add_tail_rows(self, number: int, examples: list[CachedExample]) -> None:
        """Read what a shard stores of each target's tail, if anything, into its ``examples``."""
        shard = self.manifest.shards[number]
        if shard.tail_rows is None:
            return
        name, is_lossless = shard.tail_rows.name, find_codec(shard.codec).is_lossless
        data = self.folder.read_recorded(shard.tail_rows, max_bytes=layout.MAX_SHARD_BYTES)
        decode_tail_rows(data, examples, self.manifest.identity, is_lossless=is_lossless, name=name)

    def sketches(self) -> dict[int, Sketch]:
        """Sketches by layer, read and checked anew; empty if none are stored."""
        return {layer: self.sketch(layer) for layer in self.manifest.sketches}

    def sketch(self, layer: int) -> Sketch:
        """The sketch of a layer that has one, read and checked anew."""
        record = self.manifest.sketches[layer]
        data = self.folder.read_recorded(record.sketch, max_bytes=layout.MAX_FILE_BYTES)
        return decode_sketch(data, record, vocab_size=self.manifest.identity.vocab_size)

    def tail_sums(self) -> dict[int, NDArray[np.int64]]:
        """Tail sums of the cache by layer, (V,) in units of 1 / `FIXED_POINT`; empty if none are stored."""
        record = self.manifest.tail_sums
        if record is None:
            return {}
        data = self.folder.read_recorded(record, max_bytes=layout.MAX_FILE_BYTES)
        return decode_tails(data, self.manifest.identity, num_targets=self.manifest.num_targets, name=record.name)

    @property
    def example_digests(self) -> list[str]:
        """(N,) `example_digest` of each example: its tokens and target positions."""
        return [self._index[place].digest for place in range(len(self))]

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer's files, after each was digested and no other was found beside them."""
        return self.folder.tokenizer(self.manifest.tokenizer_files)

    def require(
        self,
        *,
        tokenizer_digest: str | None = None,
        vocab_size: int | None = None,
        layers: Collection[int] | None = None,
        lens_norm: str | None = None,
        temperature: float | None = None,
        allow_mismatch: Collection[str] = (),
    ) -> list[str]:
        """Compare the cache with what a run needs.

        None is not compared, and ``layers`` need only be among the cache's.

        Returns the differences in fields named in ``allow_mismatch``, one sentence each; any other
        difference is a `CacheError` that names the field, both values and what to do.
        """
        unknown = sorted(set(allow_mismatch) - set(READER_FIELDS))
        if unknown:
            raise CacheError(f"--allow-mismatch {unknown[0]}: no such field; there are {', '.join(READER_FIELDS)}.")
        identity = self.manifest.identity
        wanted = {
            "tokenizer_digest": tokenizer_digest,
            "vocab_size": vocab_size,
            "lens_norm": lens_norm,
            "temperature": temperature,
        }
        differences = {
            name: f"{name}: cache has {getattr(identity, name)!r}, this run has {value!r}"
            for name, value in wanted.items()
            if value is not None and value != getattr(identity, name)
        }
        missing = sorted(set(layers or ()) - set(identity.layers))
        refused = [text for name, text in differences.items() if name not in allow_mismatch]
        if missing:
            refused.append(f"layers: cache has {list(identity.layers)}, this run also wants {missing}")
        if refused:
            raise CacheError(
                f"{self.folder} does not fit this run:\n  "
                + "\n  ".join(refused)
                + "\nTake a cache made for it, or change the run; `--allow-mismatch FIELD` accepts a "
                "difference (never of layers) and records it."
            )
        return [text for name, text in differences.items() if name in allow_mismatch]

    def _check_sums(self) -> None:
        for number, shard in enumerate(self.manifest.shards):
            part = slice(self._starts[number], self._starts[number + 1])
            found = int(self.num_tokens[part].sum()), int(self.num_targets[part].sum())
            if found != (shard.num_tokens, shard.num_targets):
                raise CacheError(
                    f"{layout.MANIFEST} gives shard {number} {shard.num_tokens} tokens and "
                    f"{shard.num_targets} targets, {layout.INDEX} gives it {found[0]} and {found[1]}."
                )


def read_manifest(folder: CacheFolder) -> bytes:
    """The bytes of the manifest; a `CacheError` that says what to do if there is none."""
    folder.require()
    if not folder.exists(layout.MANIFEST):
        if folder.exists(layout.PLAN):
            raise CacheError(
                f"{folder} is unfinished: it has a plan but no {layout.MANIFEST}, so its writer was stopped. "
                f"Run `distilllens cache-teacher` again with the same config to finish it."
            )
        raise CacheError(
            f"{folder} has no {layout.MANIFEST}: not a teacher cache, or one whose writer was stopped. "
            f"Run `distilllens cache-teacher` again with the same config to finish it."
        )
    return folder.read(layout.MANIFEST, max_bytes=layout.MAX_JSON_BYTES)
