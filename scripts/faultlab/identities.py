"""Identities that differ in one element of one field."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from distilllens_cache import CODECS, CacheError, CacheReader, Identity
from faultlab.material import files_of
from faultlab.outcome import Outcome
from faultlab.writing import Writing

TEXTS = ("sampled:7", "none", "profile", "arrow-fp16", "arrow-fp32", "packed", "none", "final")
"""Other values of fields that not every text fits."""


def neighbours(identity: Identity) -> Iterator[tuple[str, Identity]]:
    """For every field, the name and each identity with one element of it changed, as far as there is one."""
    for name in Identity.model_fields:
        for value in _changed(getattr(identity, name), identity.layers):
            content = identity.model_dump() | {name: value}
            if name == "layers":  # what is said by layer has to follow
                content |= {key: _renamed(content[key], identity.layers, value) for key in BY_LAYER}
            if name == "num_layers":
                content |= {"layers": (*identity.layers[:-1], value)}
                content |= {key: _renamed(content[key], identity.layers, content["layers"]) for key in BY_LAYER}
            try:
                found = Identity(**content)
            except ValidationError:
                continue
            if getattr(found, name) != getattr(identity, name) and found.codec in CODECS:
                yield name, found


BY_LAYER = ("top_k", "min_k", "min_prob", "top_p", "store_tail")


@dataclass
class OtherIdentities(Writing):
    """Trial n: a writer with the n-th neighbouring identity, on a cache that is half written."""

    @cached_property
    def neighbours(self) -> list[tuple[str, Identity]]:
        return list(neighbours(self.material.identity))

    def __call__(self, number: int) -> Outcome:
        name, other = self.neighbours[number]
        folder = self.folder("half")
        before = files_of(folder)
        try:
            self.material.writer(folder, identity=other)
        except CacheError as error:
            if f"{name}: cache has" not in str(error) or "--overwrite" not in str(error):
                return Outcome("not named", f"{name} differs, the writer says: {error}")
        else:
            return Outcome("silent", f"{name} differs, the writer went on")
        return Outcome("refused by name", "" if files_of(folder) == before else f"{name}: the folder was changed")


@dataclass
class OtherReaders(Writing):
    """Trial n: a run that needs another value of the n-th field that readers compare."""

    def __call__(self, number: int) -> Outcome:
        reader = CacheReader(self.cache)
        found = reader.manifest.identity
        name, value = list(self.others(found).items())[number]
        try:
            reader.require(**{name: value})
        except CacheError as error:
            return Outcome("refused by name", "" if f"{name}: cache has" in str(error) else str(error))
        return Outcome("silent", f"{name} differs, the reader went on")

    @staticmethod
    def others(found: Identity) -> dict[str, Any]:
        return {
            "tokenizer_digest": found.tokenizer_digest[:-1] + "x",
            "vocab_size": found.vocab_size + 1,
            "layers": [*found.layers, found.num_layers + 1],
            "lens_norm": "none" if found.lens_norm == "final" else "final",
            "temperature": found.temperature + 0.001,
        }


def _changed(value: Any, layers: tuple[int, ...]) -> Iterator[Any]:
    """Values one element away."""
    if isinstance(value, str):
        yield value[:-1] + ("0" if value[-1:] != "0" else "1")
        yield from TEXTS
    elif isinstance(value, int | float):
        yield from (value + 1, value - 1, value * 0.999, value * 1.001)
    elif isinstance(value, tuple):
        for place in range(len(value)):
            yield value[:place] + value[place + 1 :]
            yield (*value[:place], value[place] - 1, *value[place + 1 :])
    elif isinstance(value, dict):
        for layer in layers:
            for other in _changed(value.get(layer, 1), layers):
                yield value | {layer: other}
            yield {key: part for key, part in value.items() if key != layer}


def _renamed(value: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Any:
    """What was said of ``old`` layers, said of ``new`` ones."""
    if not isinstance(value, dict):
        return value
    names = dict(zip(old, new, strict=False)) if len(old) == len(new) else {layer: layer for layer in new}
    return {names[layer]: part for layer, part in value.items() if layer in names}
