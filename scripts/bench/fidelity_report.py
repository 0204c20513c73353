"""What the fidelity bench found, as a table, a JSON file and a picture."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

LOSSES = ("fkl", "rkl", "jsd", "jeffreys", "skew_rkl")
COLOURS = {
    "profile": "#0b7a75",
    "sketch": "#7b2d8b",
    "bucket": "#d9822b",
    "sampled": "#3b6fb6",
    "renorm": "#9a9a9a",
    "others": "#c0392b",
    "tried": "#b7a36b",
}
LEFT_OUT = {"0"}
"""Students whose distance from the teacher is that of noise; they stand in the JSON and in a column of their own."""


def write(output: Path) -> None:
    """Table on stdout, ``fidelity.json`` and ``fidelity.svg`` in ``output``, from all its measured pieces."""
    lines = [line for file in sorted(output.glob("student-*.json")) for line in json.loads(file.read_text())]
    if not lines:
        raise SystemExit(f"nothing is measured in {output} yet")
    places = {"lens": [one for one in lines if not one["is_final"]], "final": [one for one in lines if one["is_final"]]}
    summary = {place: summarise(rows) for place, rows in places.items() if rows}
    (output / "fidelity.json").write_text(json.dumps(summary, indent=1) + "\n")
    for place, rows in summary.items():
        print_table(place, rows)
    draw(summary, output / "fidelity.svg")


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each representation, over students and layers: mean bytes, and by loss mean and least of what was measured."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["name"]].append(line)
    rows = []
    for name, group in groups.items():
        row: dict[str, Any] = {"name": name, "family": group[0]["family"], "bytes": mean(one["bytes"] for one in group)}
        for loss in LOSSES:
            found = [one[loss] for one in group if loss in one]
            row[loss] = {
                "cosine": mean(one["cosine"] for one in found),
                "worst": min(one["cosine"] for one in found),
                "norm": mean(one["norm"] for one in found),
                "loss": mean(one["loss"] for one in found),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row["bytes"])


def front(rows: list[dict[str, Any]], loss: str) -> list[dict[str, Any]]:
    """Representations that no other beats in both bytes and cosine, by rising bytes."""
    best, found = -2.0, []
    for row in sorted(rows, key=lambda row: (row["bytes"], -row[loss]["cosine"])):
        if row[loss]["cosine"] > best:
            best = row[loss]["cosine"]
            found.append(row)
    return found


def print_table(place: str, rows: list[dict[str, Any]]) -> None:
    """Mean cosine (worst) and loss ratio of each loss; * where no other is better at as few bytes."""
    fronts = {loss: {row["name"] for row in front(rows, loss)} for loss in LOSSES}
    print(f"\n{place} layer{'s' if place == 'lens' else ''}: cosine (worst) loss ratio, * = on the Pareto front")
    print(f"{'representation':<36}{'bytes':>7}" + "".join(f"{loss:>24}" for loss in LOSSES))
    for row in rows:
        cells = []
        for loss in LOSSES:
            one, mark = row[loss], "*" if row["name"] in fronts[loss] else " "
            cells.append(f"{one['cosine']:>9.4f} ({one['worst']:.3f}) {one['loss']:.3f}{mark}")
        print(f"{row['name']:<36}{row['bytes']:>7.1f}" + "".join(f"{cell:>24}" for cell in cells))


def draw(summary: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """One panel for each place and loss: bytes against 1 - cosine, both logarithmic, with the Pareto front."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {
        "svg.hashsalt": "distilllens",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    losses = ("fkl", "jsd", "rkl")
    figure, axes = pyplot.subplots(len(summary), len(losses), figsize=(10, 3.2 * len(summary)), squeeze=False)
    for panels, (place, rows) in zip(axes, summary.items(), strict=True):
        for panel, loss in zip(panels, losses, strict=True):
            for family, colour in COLOURS.items():
                own = [row for row in rows if row["family"] == family]
                xs, ys = [row["bytes"] for row in own], [max(1e-6, 1 - row[loss]["cosine"]) for row in own]
                panel.scatter(xs, ys, s=14, color=colour, label=family, alpha=0.85, linewidths=0)
            best = front(rows, loss)
            panel.plot(
                [r["bytes"] for r in best], [max(1e-6, 1 - r[loss]["cosine"]) for r in best], color="black", lw=0.7
            )
            panel.set(xscale="log", yscale="log", title=f"{place}, {loss}", xlabel="bytes per target")
            panel.set_ylabel("1 - cosine with the dense gradient")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(COLOURS), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, metadata={"Date": None})
