"""A tiny handmade cache. Run as a script, it writes the golden caches of format v1 and what they must hold.

    python tests/golden/make_cache_v1.py

The committed files were made by it once and stay as they are: they stand for caches that users already have.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from distilllens_cache import (
    FIXED_POINT,
    CachedExample,
    CacheWriter,
    Identity,
    LayerTargets,
    PlannedExample,
    Projection,
    Sketch,
    TailSamples,
    example_digest,
    plan_shards,
)

WORDS = [
    *("<pad> <eos> the a cat dog bird fish tree house sat ran flew swam grew stood on in over under".split()),
    *("red blue green small big old new and or but not very quite almost never always here there".split()),
    *("now then who what where when why how . , ! ?".split()),
]


@dataclass
class TinyCache:
    """Everything a writer needs for a cache of a few examples, made from a seed."""

    codec: str = "arrow-fp32"
    num_examples: int = 5
    examples_per_shard: int = 3
    top_k: dict[int, int] = field(default_factory=lambda: {2: 3, 4: 6})
    vocab_size: int = 50
    store_tail: str | dict[int, str] = "profile"
    seed: int = 0
    scale: float = 3.0
    """Standard deviation of the logits: 0 gives ties, large values certainty."""
    copies_the_text: bool = False
    """Whether the teacher's likeliest token at the last layer is the true next one."""
    hidden_size: int = 8
    """Of the teacher whose hidden states a sketch encodes."""
    more: dict[str, Any] = field(default_factory=dict)
    """Other fields of the identity."""

    def __post_init__(self) -> None:
        self.layers = tuple(self.top_k)
        self.specs = self.identity.tail_specs
        self.sketches = {layer: self._sketch(layer) for layer in self.identity.sketch_layers}
        rng = np.random.default_rng(self.seed)
        made = [self._example(rng, index) for index in range(self.num_examples)]
        self.examples = [example for example, _ in made]
        self.planned = [
            PlannedExample(
                example.id,
                example_digest(example.token_ids, example.target_positions),
                len(example.token_ids),
                len(example.target_positions),
            )
            for example in self.examples
        ]
        self.shards = plan_shards(self.planned, examples_per_shard=self.examples_per_shard, bytes_per_target=50)
        self.tails = [
            {
                layer: np.sum([tails[layer] for _, tails in made[part.start : part.stop]], axis=0)
                for layer in self.identity.profile_layers
            }
            for part in self.shards
        ]

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher="handmade",
            teacher_digest="11" * 32,
            teacher_config_digest="22" * 32,
            num_layers=self.layers[-1],
            dtype="float32",
            attn_implementation="eager",
            torch_version="2.13.0",
            transformers_version="5.23.0",
            device="cpu",
            tokenizer_digest="33" * 32,
            template_digest="44" * 32,
            vocab_size=self.vocab_size,
            dataset_digest="55" * 32,
            layers=self.layers,
            lens_norm="final",
            top_k=self.top_k,
            store_tail=self.store_tail,
            temperature=1.0,
            codec=self.codec,
            batch_tokens=64,
            examples_per_shard=self.examples_per_shard,
            seed=self.seed,
            **self.more,
        )

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        tokenizer: Any = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
        tokenizer.pre_tokenizer = Whitespace()
        return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b"{}\n"}

    def writer(self, folder: Path, **kwargs: Any) -> CacheWriter:
        """A writer of this cache; ``kwargs`` replace its arguments."""
        arguments: dict[str, Any] = {
            "identity": self.identity,
            "examples": self.planned,
            "tokenizer_files": self.tokenizer_files,
            "shards": self.shards,
        }
        return CacheWriter(folder, **(arguments | kwargs))

    def write_shards(self, writer: CacheWriter, numbers: Iterable[int]) -> None:
        for number in numbers:
            part = self.shards[number]
            writer.write_shard(number, self.examples[part.start : part.stop], self.tails[number] or None)

    def write_sketches(self, writer: CacheWriter) -> None:
        for layer in writer.missing_sketches():
            writer.write_sketch(layer, *self.sketches[layer])

    def write(self, folder: Path, **kwargs: Any) -> Path:
        """Write what ``folder`` still lacks, and finish it."""
        writer = self.writer(folder, **kwargs)
        self.write_sketches(writer)
        self.write_shards(writer, writer.unfinished())
        writer.finish()
        return folder

    def _example(self, rng: np.random.Generator, index: int) -> tuple[CachedExample, dict[int, np.ndarray]]:
        num_tokens = int(rng.integers(6, 12))
        token_ids = rng.integers(0, self.vocab_size, num_tokens).astype(np.uint32)
        first = int(rng.integers(1, num_tokens - 2))
        positions = np.arange(first, num_tokens - 1, dtype=np.uint32)
        targets, tails = {}, {}
        for layer in self.layers:
            logits = self.scale * rng.normal(0, 1, (len(positions), self.vocab_size))
            if self.copies_the_text and layer == self.layers[-1]:
                logits[np.arange(len(positions)), token_ids[positions + 1]] += 30
            sparse, tails[layer] = self._targets(rng, logits, self.top_k[layer])
            targets[layer] = self._with_tail_rows(sparse, logits, layer, index)
        return CachedExample(index, f"row-{index}", token_ids, positions, targets), tails

    def _targets(self, rng: np.random.Generator, logits: np.ndarray, top_k: int) -> tuple[LayerTargets, np.ndarray]:
        """Ragged sparse targets of dense logits, in float64, and their tail sums."""
        logits = logits - logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        ranked = np.take_along_axis(log_probs, order, -1)
        counts = rng.integers(1, top_k + 1, len(logits)).astype(np.int32)
        is_kept = np.arange(self.vocab_size)[None, :] < counts[:, None]
        rest = np.where(is_kept, 0, np.exp(ranked))
        log_rest = np.log(np.maximum(rest.sum(-1), np.exp(-100.0)))
        tails = np.zeros(self.vocab_size, np.int64)
        np.add.at(tails, order.ravel(), np.rint(rest * FIXED_POINT).astype(np.int64).ravel())
        targets = LayerTargets(
            counts,
            order[is_kept].astype(np.uint32),
            np.minimum(ranked[is_kept], 0).astype(np.float32),
            np.clip(log_rest, -100, 0).astype(np.float32),
        )
        return targets, tails

    def _sketch(self, layer: int) -> tuple[Sketch, Projection]:
        spec = self.specs[layer].sketch
        assert spec is not None
        rng = np.random.default_rng([self.seed, layer])
        sketch = Sketch(
            rng.normal(0, 1, (self.vocab_size, spec.rank)).astype(np.float16),
            rng.normal(0, 1, self.vocab_size).astype(np.float32),
            30.0 if layer == self.layers[-1] else None,
        )
        weights = 3 * rng.normal(0, 1, (self.hidden_size, spec.rank))
        mean = rng.normal(0, 1, self.hidden_size)
        return sketch, Projection(weights.astype(np.float32), mean.astype(np.float32), spec.bits)

    def _with_tail_rows(self, targets: LayerTargets, logits: np.ndarray, layer: int, index: int) -> LayerTargets:
        """The same with codes of made-up hidden states and with draws from the tail, where the cache has them."""
        spec = self.specs[layer]
        rng = np.random.default_rng([self.seed, layer, index])
        codes = samples = None
        if spec.sketch is not None:
            codes = self.sketches[layer][1].encode(rng.normal(0, 1, (len(logits), self.hidden_size)).astype(np.float32))
        if spec.draws is not None:
            logits = logits - logits.max(-1, keepdims=True)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            draws = np.zeros(log_probs.shape, np.int64)
            for row in np.flatnonzero(targets.log_rest > -30):
                tail = np.exp(log_probs[row])
                tail[targets.ids[targets.offsets[row] : targets.offsets[row + 1]]] = 0
                draws[row] = rng.multinomial(spec.draws, tail / tail.sum())
            samples = TailSamples(
                (draws > 0).sum(-1).astype(np.int32),
                np.nonzero(draws)[1].astype(np.uint32),
                draws[draws > 0].astype(np.uint16),
                np.minimum(log_probs[draws > 0], 0).astype(np.float32),
            )
        return dataclasses.replace(targets, codes=codes, samples=samples)


SKETCHED: dict[str, Any] = {
    "top_k": {2: 3, 3: 4, 4: 6},
    "store_tail": {2: "profile+sampled:5", 3: "sketch:4:8", 4: "profile+sketch:5+sampled:8"},
    "more": {"min_k": {2: 1, 4: 2}, "min_prob": {2: 0.001}, "top_p": {4: 0.98}, "calibration_targets": 100},
}
"""Arguments of a `TinyCache` in which layers store different things of their tails."""


def tail_contents(cache: TinyCache) -> dict[str, Any]:
    """What a reader must find of tail rows and sketches, as JSON."""

    def lists(value: Any, names: Iterable[str]) -> Any:
        return None if value is None else {name: getattr(value, name).tolist() for name in names}

    return {
        "tail_rows": [
            {
                str(layer): {
                    "codes": None if targets.codes is None else targets.codes.tolist(),
                    "samples": lists(targets.samples, ("counts", "ids", "draws", "log_probs")),
                }
                for layer, targets in example.targets.items()
            }
            for example in cache.examples
        ],
        "sketches": {
            str(layer): {"softcap": sketch.softcap, **lists(sketch, ("basis", "offset"))}
            for layer, (sketch, _) in cache.sketches.items()
        },
    }


def contents(cache: TinyCache) -> dict[str, Any]:
    """What a reader of the cache must find, as JSON; a float64 holds a float32 exactly."""
    return {
        "examples": [
            {
                "id": example.id,
                "token_ids": example.token_ids.tolist(),
                "target_positions": example.target_positions.tolist(),
                "targets": {
                    str(layer): {
                        "counts": targets.counts.tolist(),
                        "ids": targets.ids.tolist(),
                        "log_probs": targets.log_probs.tolist(),
                        "log_rest": targets.log_rest.tolist(),
                    }
                    for layer, targets in example.targets.items()
                },
            }
            for example in cache.examples
        ],
        "tail_sums": {
            str(layer): np.sum([tails[layer] for tails in cache.tails], axis=0).tolist() for layer in cache.tails[0]
        },
    }


if __name__ == "__main__":
    here = Path(__file__).parent
    TinyCache(codec="arrow-fp32").write(here / "cache_v1")
    TinyCache(codec="arrow-fp16").write(here / "cache_v1_fp16")
    (here / "cache_v1.json").write_text(json.dumps(contents(TinyCache()), indent=1) + "\n")
    sketched = TinyCache(**SKETCHED)
    sketched.write(here / "cache_v1_sketch")
    (here / "cache_v1_sketch.json").write_text(json.dumps(contents(sketched) | tail_contents(sketched)) + "\n")
