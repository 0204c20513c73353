"""The calibration pass: some thousand target positions of the teacher fix the sketch of each layer.

It comes before the first shard, since codes mean nothing without the directions that they belong to. Which examples
it reads, and in which order, is a pure function of the seed; its state can be kept, so that a pass that was stopped
goes on where it was and ends with the same bytes.
"""

import io
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from distilllens.data import Example
from distilllens.fused import Head
from distilllens.lens import LogitLens
from distilllens.sketch_fit import STEPS, FittedSketch, Moments, fit_sketch
from distilllens.teacher_pass import TeacherPass
from distilllens_cache import CacheWriter, Projection, Sketch, SketchSpec

CHUNK_EXAMPLES = 32
"""Examples between two states that can be kept."""
BLOCK_ROWS = 8192
"""Rows of the head that are in float64 at a time; all of them would be 10 GB for 152k x 8192."""
SECONDS_BETWEEN_STATES = 60.0
MAX_STATE_BYTES = 1 << 29


def calibration_order(examples: Sequence[Example], *, num_targets: int, seed: int) -> list[int]:
    """Places of the examples that calibration reads: a random order, until they have ``num_targets`` targets."""
    order = np.random.Generator(np.random.Philox(key=[seed % 2**64, 0])).permutation(len(examples))
    counts = np.cumsum([examples[place].num_targets for place in order])
    return [int(place) for place in order[: int(np.searchsorted(counts, num_targets)) + 1]]


def write_sketches(
    teacher: TeacherPass,
    writer: CacheWriter,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> TeacherPass:
    """The teacher with what encodes its sketches; those that the cache lacks are fitted to ``examples`` first."""
    specs = {layer: spec for layer in writer.missing_sketches() if (spec := teacher.tails[layer].sketch) is not None}
    if specs:
        moments = _collect(teacher, writer, examples, specs, batch_tokens, progress)
        for layer, spec in specs.items():
            sketch = make_sketch(moments[layer], teacher.lens, spec, temperature=teacher.temperature)
            writer.write_sketch(layer, *sketch)
    return replace(teacher, projections={layer: projection for layer, (_, projection) in writer.sketches().items()})


def _collect(
    teacher: TeacherPass,
    writer: CacheWriter,
    examples: Sequence[Example],
    layers: Collection[int],
    batch_tokens: int,
    advance: Callable[[int], None],
) -> dict[int, Moments]:
    chunks = [examples[start : start + CHUNK_EXAMPLES] for start in range(0, len(examples), CHUNK_EXAMPLES)]
    done, moments = _unpack(writer.read_calibration(), teacher, layers)
    saved = time.monotonic()
    for number, chunk in enumerate(chunks):
        if number >= done:
            for layer, normed, _, tail in teacher.read(chunk, tuple(layers), batch_tokens=batch_tokens):
                moments[layer].add(normed.to(teacher.lens.device), tail.to(teacher.lens.device))
            if time.monotonic() - saved >= SECONDS_BETWEEN_STATES and (state := _pack(number + 1, moments)):
                writer.write_calibration(state)
                saved = time.monotonic()
        advance(sum(example.num_tokens for example in chunk))
    return moments


def make_sketch(
    moments: Moments, lens: LogitLens, spec: SketchSpec, *, temperature: float = 1.0
) -> tuple[Sketch, Projection]:
    """What turns a layer's hidden states into codes, and codes into the logits of its tail."""
    head = lens.loaded_head()
    if head is None:
        raise ValueError("a sketch needs a teacher whose head is one matrix; use --store-tail profile")
    return round_sketch(fit_sketch(moments, head.weight.detach(), spec.rank), head, spec, temperature=temperature)


def round_sketch(
    fitted: FittedSketch, head: Head, spec: SketchSpec, *, temperature: float = 1.0
) -> tuple[Sketch, Projection]:
    """A fitted sketch in the steps of its codes, as the cache holds it."""
    scale, steps = head.scale / temperature, STEPS[spec.bits] * fitted.deviations
    directions = fitted.directions * steps
    basis, offset = [], []
    for start in range(0, len(head.weight), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        weight = head.weight[rows].detach().double()
        bias = 0.0 if head.bias is None else head.bias[rows].detach().double()
        basis.append(_numpy((weight @ directions) * scale).astype(np.float16))
        offset.append(_numpy((weight @ fitted.mean + bias) * scale).astype(np.float32))
    sketch = Sketch(
        np.concatenate(basis),
        np.concatenate(offset),
        None if head.softcap is None else head.softcap / temperature,
    )
    bits = cast(Literal[4, 8], spec.bits)
    return sketch, Projection(
        _numpy(fitted.encoder / steps).astype(np.float32), _numpy(fitted.mean).astype(np.float32), bits
    )


def _pack(done: int, moments: dict[int, Moments]) -> bytes | None:
    """The state as bytes; None where it is too large to be worth keeping."""
    if sum(sums.outer.nbytes + sums.tail.nbytes for sums in moments.values()) > MAX_STATE_BYTES:
        return None
    arrays: dict[str, np.ndarray] = {"done": np.array(done)}
    for layer, sums in moments.items():
        arrays |= {f"{layer}.count": np.array(sums.count), f"{layer}.total": _numpy(sums.total)}
        arrays |= {f"{layer}.outer": _numpy(sums.outer), f"{layer}.tail": _numpy(sums.tail)}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpack(data: bytes | None, teacher: TeacherPass, layers: Collection[int]) -> tuple[int, dict[int, Moments]]:
    head = teacher.lens.matrix_head()
    assert head is not None
    device = teacher.lens.device
    if data is None:
        size = head.weight.shape[1]
        return 0, {layer: Moments.empty(size, teacher.lens.vocab_size, device) for layer in layers}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return int(arrays["done"]), {
            layer: Moments(
                int(arrays[f"{layer}.count"]),
                *(torch.from_numpy(arrays[f"{layer}.{name}"]).to(device) for name in ("total", "outer", "tail")),
            )
            for layer in layers
        }


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
