"""How faithfully stored targets carry a teacher: their gradient against the dense one, for every byte they cost.

    python scripts/bench/fidelity.py measure --teacher T --student 0=S0 --student 60=S60 --data rows.jsonl --output out
    python scripts/bench/fidelity.py report --output out          # table, out/fidelity.json, out/fidelity.svg

For each student (by its name, such as the steps it was trained) and each layer: the gradient of each loss at the
student's hidden states, from what a cache would give back (through its codec) and from the dense teacher. Cosine, ratio
of norms, ratio of losses, bytes per target as stored. Rows that fit profiles and sketches are not those measured.
`measure` keeps each student and layer in a file of its own and continues where it was stopped.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import fidelity_report
import numpy as np
import rivals
import torch
from representation import Gradients, Representation
from stored_targets import Stored, store, with_samples
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from distilllens.calibration import round_sketch
from distilllens.data import load_examples
from distilllens.divergence import DIVERGENCES, sparse_divergence
from distilllens.layer_maps import derive_pairs, parse_layers
from distilllens.lens import LogitLens, num_layers, rows_at
from distilllens.models import load_model
from distilllens.sketch_fit import FittedSketch, Moments, fit_sketch
from distilllens.tails import BucketTail, Outcomes, ProfileTail, RenormTail, SampledTail, SketchTail, Tail
from distilllens.targets import SparseTargets, join_rows, keeps, take_top_k
from distilllens.vocabulary import effective_vocab_size
from distilllens.widths import Width
from distilllens_cache import LOG_FLOOR, SketchSpec, tail_profile

LOSSES = ("fkl", "rkl", "jsd", "jeffreys", "skew_rkl")
WIDTHS = (4, 8, 16, 32, 64, 128)
ADAPTIVE = {
    "p>=.001": Width(128, min_prob=1e-3),
    "p>=.0003": Width(128, min_prob=3e-4),
    "p>=.003": Width(128, min_prob=3e-3),
    "top-p .99": Width(128, top_p=0.99),
    "top-p .999": Width(128, top_p=0.999),
}
RANKS = (16, 32, 64, 128)
CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "report"])
    parser.add_argument("--teacher")
    parser.add_argument("--student", action="append", default=[], help="NAME=FOLDER; several")
    parser.add_argument("--data", help="rows as for cache-teacher")
    parser.add_argument("--layers", default="anchors:5")
    parser.add_argument("--calibration-rows", type=int, default=120)
    parser.add_argument("--rows", type=int, default=36, help="rows measured, after those of the calibration")
    parser.add_argument("--targets", type=int, default=128, help="target positions measured, spread over those rows")
    parser.add_argument("--codec", default="packed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.what == "measure":
        measure(arguments)
    fidelity_report.write(arguments.output)


def measure(arguments: argparse.Namespace) -> None:
    """Every layer and student that is not on disk yet; what a teacher's layer gives is shared by all students."""
    teacher = Reader(arguments.teacher, arguments)
    layers = parse_layers(arguments.layers, num_layers(teacher.model))
    students = {
        name: Reader(folder, arguments) for name, _, folder in (one.partition("=") for one in arguments.student)
    }
    for layer in reversed(layers):
        files = {name: arguments.output / f"student-{name}-layer-{layer}.json" for name in students}
        if all(file.exists() for file in files.values()):
            continue
        of_teacher = TeacherLayer(teacher, layer, arguments)
        sides = {}
        for name, student in students.items():
            total = num_layers(student.model)
            pairs = derive_pairs(layers, num_student_layers=total, num_teacher_layers=layers[-1])
            student_layer = {t: s for s, t in pairs}.get(layer, total)
            sides[name] = StudentSide(student, student_layer, of_teacher)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in students}
        for one in of_teacher.representations():
            for name, side in sides.items():
                rows[name].append(side.line(one) | {"student": name, "layer": layer, "is_final": layer == layers[-1]})
        for name, file in files.items():
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows[name], indent=1))
            temporary.replace(file)
        print(f"layer {layer} is measured", flush=True)


class Reader:
    """A model's lens states at target positions."""

    def __init__(self, folder: str, arguments: argparse.Namespace) -> None:
        self.model = load_model(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = effective_vocab_size(self.model, tokenizer)
        self.lens = LogitLens(self.model, lens_norm="final", vocab_size=self.vocab_size)
        head = self.lens.matrix_head()
        assert head is not None
        self.head, self.weight = head, head.weight.detach()
        limit = arguments.calibration_rows + arguments.rows
        self.examples = load_examples(
            arguments.data, tokenizer, max_length=256, max_prompt_length=128, limit=limit
        ).examples
        self.first_measured = arguments.calibration_rows

    @torch.inference_mode()
    def states(self, layer: int, examples: Any) -> Tensor:
        parts = []
        for example in examples:
            ids = torch.tensor(list(example.token_ids))[None]
            hidden = self.lens.hidden_states(ids, None, [layer])[layer]
            parts.append(self.lens.normed(rows_at(hidden, torch.tensor(list(example.is_target))[None]), layer))
        return torch.cat(parts).clone()


class StudentSide:
    """One student's layer: the dense gradient there, and that of any representation."""

    def __init__(self, student: Reader, student_layer: int, layer: "TeacherLayer") -> None:
        states = student.states(student_layer, student.examples[student.first_measured :])
        self.weight = student.weight
        self.logits = states[layer.at] @ self.weight.T
        self.dense = self.at_states(layer.full(layer.log_p))
        self._check(layer.log_p)

    def line(self, one: Representation) -> dict[str, Any]:
        """Bytes, and by loss what is left of the dense gradient and value."""
        line: dict[str, Any] = {"name": one.name, "family": one.family, "bytes": one.num_bytes}
        for loss, (value, gradient) in self.at_states(one.gradients).items():
            true_value, true_gradient = self.dense[loss]
            line[loss] = {
                "cosine": functional.cosine_similarity(gradient.flatten(), true_gradient.flatten(), dim=0).item(),
                "norm": (gradient.norm() / true_gradient.norm()).item(),
                "loss": (value.sum() / true_value.sum()).item(),
            }
        return line

    def at_states(self, gradients: Gradients) -> dict[str, tuple[Tensor, Tensor]]:
        """Values (n), and gradients at the student's hidden states (n, D)."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for where in torch.arange(len(self.logits)).split(CHUNK):
            for loss, (values, gradient) in gradients(self.logits[where], where).items():
                parts.setdefault(loss, []).append((values, gradient @ self.weight))
        return {
            loss: (torch.cat([values for values, _ in found]), torch.cat([gradient for _, gradient in found]))
            for loss, found in parts.items()
        }

    def _check(self, log_p: Tensor) -> None:
        """The shortcut for whole distributions against the plain functions of the package."""
        for loss in LOSSES:
            logits = self.logits[:4].clone().requires_grad_()
            alpha = {"alpha": 0.1} if loss == "skew_rkl" else {}
            values = DIVERGENCES[loss](log_p[:4], logits.log_softmax(-1), **alpha)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            torch.testing.assert_close(self.dense[loss][0][:4], values.detach(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(self.dense[loss][1][:4], gradient @ self.weight, rtol=1e-2, atol=1e-3)


class TeacherLayer:
    """What is kept of one layer of the teacher, in every way."""

    def __init__(self, teacher: Reader, layer: int, arguments: argparse.Namespace) -> None:
        self.vocab_size, self.weight, self.codec = teacher.vocab_size, teacher.weight, arguments.codec
        self.head = teacher.head
        first = teacher.first_measured
        self.calibration = teacher.states(layer, teacher.examples[:first])
        self.measured = teacher.states(layer, teacher.examples[first:])
        self.at = torch.linspace(0, len(self.measured) - 1, min(arguments.targets, len(self.measured))).long()
        self.log_p = self.logits(self.measured[self.at]).log_softmax(-1)
        self._mean_p, self._top = self._calibrate()
        self._whole = join_rows([take_top_k(self.logits(part), max(WIDTHS)) for part in self.measured.split(256)])
        self._sketches: dict[str, FittedSketch] = {}

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.weight.T

    # what calibration rows give

    def _fitted(self, metric: str) -> FittedSketch:
        """Of the largest rank: the first directions are those of a lower one. The tail beyond 32 ids is its metric."""
        if metric not in self._sketches:
            self._sketches[metric] = fit_sketch(self.moments(Width(32, 32)), self.weight, max(RANKS), metric=metric)
        return self._sketches[metric]

    def _calibrate(self) -> tuple[Tensor, list[SparseTargets]]:
        total, top = torch.zeros(self.vocab_size, dtype=torch.float64), []
        for part in self.calibration.split(256):
            logits = self.logits(part)
            total += logits.softmax(-1).sum(0).double()
            top.append(take_top_k(logits, 128))
        return total, top

    def tail_sums(self, width: Width) -> Tensor:
        """Probability of each token where ``width`` would not keep it, over the calibration rows."""
        sums = self._mean_p.clone()
        for targets in self._top:
            probs = targets.log_probs.exp().double()
            is_kept = keeps(probs, width)
            sums.index_add_(0, targets.ids[is_kept], -probs[is_kept])
        return sums.clamp_min(0.0)

    def profile(self, width: Width) -> ProfileTail:
        return ProfileTail(torch.from_numpy(tail_profile(self.tail_sums(width).numpy())).log().float())

    def moments(self, width: Width) -> Moments:
        moments = Moments.empty(self.calibration.shape[1], self.vocab_size)
        rows = self.calibration.double()
        moments.count, moments.total, moments.outer = len(rows), rows.sum(0), rows.T @ rows
        moments.tail = self.tail_sums(width)
        return moments

    def targets(self, width: Width) -> SparseTargets:
        """Of every measured row, unrounded: the widest targets, cut."""
        whole = self._whole
        probs = whole.log_probs.double().exp()
        is_kept = keeps(probs, width)
        rest = whole.log_rest.double().exp() + (probs * ~is_kept).sum(-1)
        cut = SparseTargets(
            whole.ids.masked_fill(~is_kept, 0),
            whole.log_probs.masked_fill(~is_kept, LOG_FLOOR),
            is_kept,
            rest.log().clamp_min(LOG_FLOOR).float(),
        )
        k = min(width.max_k, int(is_kept.sum(-1).max()))
        return replace(cut, ids=cut.ids[:, :k], log_probs=cut.log_probs[:, :k], is_kept=is_kept[:, :k])

    # the representations

    def representations(self) -> Iterator[Representation]:
        fixed = {f"k={k}": Width(k) if k == 1 else Width(k, k) for k in WIDTHS}
        for label, width in (fixed | ADAPTIVE).items():
            stored = store(self.targets(width), vocab_size=self.vocab_size, codec=self.codec)
            profile = self.profile(width)
            yield self._ours(f"{label} renorm", "renorm", stored, RenormTail())
            yield self._ours(f"{label} bucket", "bucket", stored, BucketTail())
            yield self._ours(f"{label} profile", "profile", stored, profile)
            for rank in (32, 64):
                yield self._sketch(label, width, rank, bits=4)
        for rank in RANKS:
            for label in ("k=16", "k=32"):
                if rank not in (32, 64):
                    yield self._sketch(label, fixed[label], rank, bits=4)
        # What else was tried, at one width.
        label, width = "k=32", fixed["k=32"]
        yield self._sketch(label, width, 64, bits=8)
        yield self._sketch(label, width, 64, bits=4, metric="logits")
        yield self._sketch(label, width, 64, bits=4, offset="profile")
        yield self._sketch(label, width, 32, bits=4, draws=8)
        yield self._clustered(label, width, 16)
        for kept, draws in ((8, 8), (16, 16), (32, 32)):
            yield self._sampled(kept, draws)
        yield from rivals.representations(self)

    def _ours(self, name: str, family: str, stored: Stored, tail: Tail) -> Representation:
        return Representation(name, family, stored.num_bytes, self.sparse(stored.targets[self.at], tail))

    def _sketch(
        self,
        label: str,
        width: Width,
        rank: int,
        *,
        bits: Literal[4, 8],
        metric: str = "fisher",
        offset: str = "mean",
        draws: int = 0,
    ) -> Representation:
        fitted = self._fitted(metric).first(rank)
        sketch, projection = round_sketch(fitted, self.head, SketchSpec(rank, bits))
        codes = torch.from_numpy(projection.encode(self.measured.numpy()))
        targets = replace(self.targets(width), codes=codes)
        name, spec = f"{label} sketch:{rank}", f"sketch:{rank}:{bits}"
        if draws:
            targets, name, spec = self._draw(targets, draws), f"{name}+sampled:{draws}", f"{spec}+sampled:{draws}"
        stored = store(targets, vocab_size=self.vocab_size, codec=self.codec, tail=spec)
        basis = torch.from_numpy(sketch.basis.astype(np.float32))
        shift = self.profile(width).log_profile if offset == "profile" else torch.from_numpy(sketch.offset)
        extra = (f" int{bits}" if bits != 4 else "") + (f" {metric} metric" if metric != "fisher" else "")
        extra += " offset profile" if offset == "profile" else ""
        tail: Tail = SketchTail(basis, shift)
        if draws:
            tail = ControlledTail(SketchTail(basis, shift))
        return self._ours(name + extra, "sketch" if not (extra or draws) else "tried", stored, tail)

    def _sampled(self, kept: int, draws: int) -> Representation:
        targets = self._draw(self.targets(Width(kept, kept)), draws)
        stored = store(targets, vocab_size=self.vocab_size, codec=self.codec, tail=f"sampled:{draws}")
        return self._ours(f"k={kept} sampled:{draws}", "sampled", stored, SampledTail())

    def _draw(self, targets: SparseTargets, draws: int) -> SparseTargets:
        return with_samples(targets, [self.logits(part) for part in self.measured.split(256)], draws)

    def _clustered(self, label: str, width: Width, clusters: int) -> Representation:
        """Several profiles, and with each target the number of the one that its tail is nearest to."""
        centres, profiles = cluster_tails(self, width, clusters)
        stored = store(self.targets(width), vocab_size=self.vocab_size, codec=self.codec)
        states = self.measured[self.at]
        log_p = torch.empty_like(self.log_p)
        nearest = nearest_centre(self, states, width, centres)
        for cluster in range(clusters):
            rows = nearest == cluster
            if rows.any():
                part = stored.targets[self.at[rows]]
                log_p[rows] = ProfileTail(profiles[cluster]).completed(part, self.vocab_size)
        num_bytes = stored.num_bytes + math.log2(clusters) / 8
        return Representation(f"{label} {clusters} profiles", "tried", num_bytes, self.full(log_p))

    # gradients

    def full(self, log_p: Tensor) -> Gradients:
        """Of completed targets: the five losses share everything that costs."""

        def gradients(logits: Tensor, where: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            return dense_gradients(log_p[where], logits.log_softmax(-1))

        return gradients

    def sparse(self, targets: SparseTargets, tail: Tail) -> Gradients:
        if isinstance(tail, ProfileTail | SketchTail):
            return self.full(
                torch.cat(
                    [tail.completed(targets[i : i + CHUNK], self.vocab_size) for i in range(0, len(targets), CHUNK)]
                )
            )

        def gradients(logits: Tensor, where: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            found = {}
            for loss in LOSSES:
                leaf = logits.clone().requires_grad_()
                values = sparse_divergence(loss, leaf, targets[where], tail)
                (gradient,) = torch.autograd.grad(values.sum(), leaf)
                found[loss] = values.detach(), gradient
            return found

        return gradients


class ControlledTail(Tail):
    """A sketch corrected by samples: its terms at the drawn tokens are taken back, the true ones put in their place."""

    def __init__(self, sketch: SketchTail) -> None:
        self.sketch = sketch

    def outcomes(self, log_q: Tensor, targets: SparseTargets) -> Outcomes:
        sampled = SampledTail().outcomes(log_q, targets)
        k = targets.ids.shape[1]
        assert targets.samples is not None
        assert sampled.counts is not None
        log_p = self.sketch.completed(targets, log_q.shape[-1])
        counts, true_p, at_q = sampled.counts[:, k:], sampled.log_p[:, k:], sampled.log_q[:, k:]
        return Outcomes(
            torch.cat([log_p, true_p, log_p.gather(-1, targets.samples.ids)], -1),
            torch.cat([log_q, at_q, at_q], -1),
            torch.cat([torch.ones_like(log_q), counts, -counts], -1),
        )

    def completed(self, targets: SparseTargets, vocab_size: int) -> Tensor:
        return self.sketch.completed(targets, vocab_size)


def dense_gradients(log_p: Tensor, log_q: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and gradients at the logits, q (G - <q, G>), of all losses at once."""
    p, q, t = log_p.exp(), log_q.exp(), log_p - log_q

    def centred(slope: Tensor) -> Tensor:
        return q * (slope - (q * slope).sum(-1, keepdim=True))

    found = {"fkl": ((p * t).sum(-1), q - p), "rkl": (-(q * t).sum(-1), centred(-t))}
    found["jeffreys"] = tuple((a + b) / 2 for a, b in zip(found["fkl"], found["rkl"], strict=True))  # type: ignore[assignment]
    to_mixture = math.log(2) - torch.nn.functional.softplus(t)
    jsd = ((q * to_mixture).sum(-1) + (p * (to_mixture + t)).sum(-1)) / 2
    found["jsd"] = jsd, centred(to_mixture / 2)
    alpha = 0.1
    skewed = -torch.logaddexp(torch.full_like(t, math.log(alpha)), t + math.log1p(-alpha))
    found["skew_rkl"] = (q * skewed).sum(-1), centred(skewed + 1 - alpha * skewed.exp())
    return found


def cluster_tails(layer: TeacherLayer, width: Width, clusters: int, rounds: int = 15) -> tuple[Tensor, Tensor]:
    """Centres (C, D) of the tails' mean head rows, by k-means, and the log-profile (C, V) of each."""
    means = torch.cat([tail_means(layer, part, width) for part in layer.calibration.split(256)])
    centres = means[torch.linspace(0, len(means) - 1, clusters).long()].clone()
    for _ in range(rounds):
        nearest = torch.cdist(means, centres).argmin(-1)
        for cluster in range(clusters):
            if (nearest == cluster).any():
                centres[cluster] = means[nearest == cluster].mean(0)
    nearest = torch.cdist(means, centres).argmin(-1)
    sums = torch.zeros(clusters, layer.vocab_size)
    for start, part in zip(range(0, len(means), 256), layer.calibration.split(256), strict=True):
        sums.index_add_(0, nearest[start : start + 256], tail_of(layer, part, width))
    sums = sums + 1e-12
    shares = 0.99 * sums / sums.sum(-1, keepdim=True)
    whole = sums.sum(0) / sums.sum()
    return centres, (shares + 0.009 * whole + 0.001 / layer.vocab_size).log()


def tail_of(layer: TeacherLayer, states: Tensor, width: Width) -> Tensor:
    probs = layer.logits(states).softmax(-1)
    return probs.scatter(-1, probs.topk(width.max_k, -1).indices, 0.0)


def tail_means(layer: TeacherLayer, states: Tensor, width: Width) -> Tensor:
    tail = tail_of(layer, states, width)
    return (tail / tail.sum(-1, keepdim=True)) @ layer.weight


def nearest_centre(layer: TeacherLayer, states: Tensor, width: Width, centres: Tensor) -> Tensor:
    return torch.cdist(tail_means(layer, states, width), centres).argmin(-1)


if __name__ == "__main__":
    main()
