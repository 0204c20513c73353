"""The page of a run: every value in its place, hostile files only ever text, damage told in a sentence."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from distilllens_inspect.commands import inspect
from distilllens_inspect.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    charts_of,
    make_chart,
    nice_ticks,
    thinned,
)
from distilllens_inspect.report import render
from distilllens_inspect.run_files import read_run
from distilllens_inspect.run_page import open_run_page

finite = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-12)
HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table><!--", "{{ 7*7 }}"]


def entry(*top: tuple[int, float], next: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"top": [list(one) for one in top], "rest": 0.1, "entropy": 0.5, "next": next, **more}


def samples(**changes: Any) -> dict[str, Any]:
    """One example of five tokens with targets at positions 1 and 2, and pairs 1:2 and 2:4."""
    teacher = [entry((3, 0.8), (2, 0.1), next=0.8, rank=1), entry((1, 0.9), others=[4, 0.05])]
    student = [entry((2, 0.5), next=0.3, rank=2), entry((0, 0.6), next=0.6, rank=1)]
    pair = {"jsd": [0.1, math.log(2)], "teacher": teacher, "student": student}
    example = {"index": 7, "id": "row", "token_ids": [0, 1, 2, 3, 0], "positions": [1, 2], "num_targets": 3}
    content = {"format_version": 1, "step": 20, "pairs": [[1, 2], [2, 4]]}
    return content | {"examples": [example | {"pairs": [pair, pair]}]} | changes


@pytest.fixture
def make_run(tmp_path):
    """``make_run(lines, samples, pieces)`` writes a run's folder."""

    def make(
        lines: list[Any] | None = None, content: Any = None, pieces: tuple[str, ...] = ("a", "b", "c", "d")
    ) -> Path:
        folder = tmp_path / "a-run"
        folder.mkdir(exist_ok=True)
        lines = (
            [{"step": n, "train/loss": 5.0 / n, "train/lens/1:2": 0.1} for n in (1, 2, 3)] if lines is None else lines
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token=pieces[0])).save(
            str(folder / "tokenizer.json")
        )
        if content is not None:
            (folder / "lens_samples.json").write_text(json.dumps(content))
        return folder

    return make


def test_every_teacher_of_a_run_with_several_has_its_curves(make_run) -> None:
    names = ("kept_mass/final", "lens", "lens/1:2", "student_mass/final", "task")
    own = {f"train/{cache}/{name}": 0.5 for cache in ("big", "far/small") for name in names}
    line = {"step": 1, "train/loss": 1.0, "train/task": 0.6, "train/lens": 0.4, "train/teacher_jsd/final": 0.1, **own}
    charts = charts_of(read_run(make_run([line])))
    shown = {chart.title: [curve.name for curve in chart.curves] for chart in charts}
    assert shown == {
        "Loss in training": ["loss", "task", "lens"],
        "Loss by teacher": ["big lens", "big task", "far/small lens", "far/small task"],
        "JSD between the teachers": ["final"],
        "Lens divergence in training, by pair": ["big 1:2", "far/small 1:2"],
        "Probability of the kept tokens": [
            f"{side} {cache} final" for side in ("teacher", "student") for cache in ("big", "far/small")
        ],
    }


def page_of(folder: Path) -> str:
    return render(None, [], open_run_page(folder, None, max_positions=64))


class Tags(HTMLParser):
    """Elements with their attributes, and whether all are closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@settings(deadline=None)
@given(finite, finite)
def test_ticks_are_few_even_and_enclose_the_values(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)
    margin = 1e-9 * max(abs(low), abs(high))
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + margin
    assert high - margin <= ticks[-1]
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=900))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float]) -> None:
    points = list(enumerate(values, 1))
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {min(values), max(values)} <= {value for _, value in kept}


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["loss", "task", "lens"]), st.lists(finite, min_size=1, max_size=20), min_size=1)
)
def test_every_point_lies_in_the_picture_and_higher_values_are_higher(series: dict[str, list[float]]) -> None:
    last = max(map(len, series.values()))
    chart = make_chart("title", "nats", {name: list(enumerate(v, 1)) for name, v in series.items()}, last_step=last)
    for curve in chart.curves:
        places = [tuple(map(float, point.split(","))) for point in curve.points.split()]
        assert all(LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for x, y in places)
        order = sorted(zip(series[curve.name], (y for _, y in places), strict=True))
        assert all(a >= b for (_, a), (_, b) in pairwise(order))
        assert curve.last == f"{series[curve.name][-1]:.4g}"


def test_the_page_has_a_curve_per_name_and_two_lenses_per_pair(make_run) -> None:
    text = page_of(make_run(content=samples()))
    tags = Tags(text)
    assert tags.open == []
    count = Counter(tag for tag, _ in tags.found)
    assert count["figure"] == count["polyline"] == 2
    cells = [attributes for tag, attributes in tags.found if tag == "td" and "data-row" in attributes]
    assert [attributes["data-row"] for attributes in cells] == [str(row) for row in (0, 0, 1, 1, 2, 2, 3, 3)]
    sides = [attributes["data-layer"] for _, attributes in tags.found if "data-layer" in attributes]
    assert sides == ["4 of the teacher", "2 of the student", "2 of the teacher", "1 of the student"]
    # The true next token's colour, hatched where the teacher didn't keep it; bold where it is the likeliest.
    assert [attributes["class"] for attributes in cells[:4]] == ["s6 right", "outside", "s4", "s6 right"]
    bars = [attributes["width"] for tag, attributes in tags.found if tag == "rect" and attributes["class"] == "value"]
    assert bars == ["14.4", "100.0"] * 2
    assert "after step 20" in text
    assert "The first 2 of 3 targets." in text


def test_a_run_without_samples_says_how_to_make_them(make_run) -> None:
    text = page_of(make_run())
    assert "This run has no lens samples" in text
    assert "--eval-cache" in text


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=20), min_size=4, max_size=4, unique=True),
    st.text(),
)
def test_nothing_in_a_run_can_become_markup(tmp_path_factory, pieces: list[str], name: str) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    lines = [{"step": 1, "train/loss": 1.0, f"train/lens/{name}": 2.0, "train/lens/1:2": 1.0}]
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
    Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token=pieces[0])).save(
        str(folder / "tokenizer.json")
    )
    content = samples()
    content["examples"][0]["id"] = name
    (folder / "lens_samples.json").write_text(json.dumps(content), encoding="utf-8")
    text = page_of(folder)
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "p", "h1", "h2", "h3", "main", "section"}
    allowed |= {"dl", "div", "dt", "dd", "figure", "figcaption", "b", "span", "svg", "line", "text", "g", "polyline"}
    allowed |= {"circle", "ul", "ol", "li", "noscript", "article", "table", "thead", "tbody", "tfoot", "tr", "th", "td"}
    allowed |= {"small", "rect", "script", "footer", "code"}
    tags = Tags(text)
    assert {tag for tag, _ in tags.found} <= allowed
    assert Counter(tag for tag, _ in tags.found)["script"] == 2
    assert not [key for _, attributes in tags.found for key in attributes if key.startswith("on") or key == "style"]
    assert not re.search(r"(src|href)=", text.split("<script>")[0].split("</style>")[1].replace("src=x", ""))


@pytest.mark.parametrize(
    "damage",
    [
        {"pairs": [[1, 2]]},
        {"examples": 3},
        {"examples": [{}]},
        {"examples": [samples()["examples"][0] | {"positions": [1, 9]}]},
        {"examples": [samples()["examples"][0] | {"token_ids": ["x"] * 5}]},
        {"format_version": 2},
    ],
)
def test_damaged_samples_are_a_sentence(make_run, damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lens_samples\.json (is not what|has format version)"):
        page_of(make_run(content=samples(**damage)))


def test_a_line_that_is_still_being_written_is_left_for_later(make_run) -> None:
    folder = make_run()
    whole = page_of(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert page_of(folder) == whole
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4 is no line of metrics"):
        page_of(folder)


def test_numbers_that_are_none_are_left_out(make_run) -> None:
    lines = [{"step": 1, "train/loss": math.nan}, {"step": 2, "train/loss": 3.0, "train/task": math.inf}]
    page = open_run_page(make_run(lines), None, max_positions=4)
    assert [[curve.name for curve in chart.curves] for chart in page.charts] == [["loss"]]


def test_the_command_says_what_it_needs(make_run, tmp_path) -> None:
    def said(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(inspect, ["report", *map(str, arguments)])
        return result.exit_code, result.output + str(result.exception or "")

    assert said("--run", make_run())[0] == 0
    assert (tmp_path / "a-run" / "report.html").is_file()
    assert "nothing to report on: give a cache, --run, or both" in said()[1]
    assert "--output FILE" in said(tmp_path)[1]
    (tmp_path / "empty").mkdir()
    assert "has no metrics.jsonl: --run takes the output folder" in said("--run", tmp_path / "empty")[1]
