"""The page: tokens are only ever text, a cell per layer and target, readable colours, nothing loaded."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from distilllens_cache import CachedExample, LayerTargets
from distilllens_inspect.colours import DARK, EDGES, LIGHT, Step, step_labels, step_of
from distilllens_inspect.heat_map import HeatMap, make_heat_map
from distilllens_inspect.report import render
from distilllens_inspect.summary import LayerSummary, Summary
from distilllens_inspect.text import TokenText

LAYERS = (2, 5)
TOP_K = 3
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table><!--",
    "' onfocus='alert(1)",
    "{{ 7*7 }}{% raw %}",
    "<![CDATA[",
    "https://example.org/x.js",
    "&lt;b&gt;",
    "\u2028\u202e\x00",
]


def token_text(pieces: list[str]) -> TokenText:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return TokenText(Tokenizer(models.WordLevel(vocabulary, unk_token=pieces[0])))


def example(num_tokens: int = 7, *, first_target: int = 2, vocab: int = 9, id: str = "row-0") -> CachedExample:
    """Positions from ``first_target`` on are targets; the true next token is kept in some rows only."""
    random = np.random.default_rng(0)
    positions = np.arange(first_target, num_tokens - 1, dtype=np.uint32)
    targets = {}
    for layer in LAYERS:
        ids = np.stack([random.permutation(vocab)[:TOP_K] for _ in positions] or [np.zeros(TOP_K)])
        masses = np.sort(random.dirichlet(np.ones(TOP_K + 1), size=len(positions))[:, :TOP_K], axis=1)[:, ::-1]
        masses = np.maximum(masses, 1e-6)
        targets[layer] = LayerTargets(
            counts=np.full(len(positions), TOP_K, np.int32),
            ids=ids[: len(positions)].astype(np.uint32).ravel(),
            log_probs=np.log(masses).astype(np.float32).ravel(),
            log_rest=np.log(np.maximum(1 - masses.sum(1), 1e-9)).astype(np.float32),
        )
    tokens = random.integers(0, vocab, num_tokens).astype(np.uint32)
    return CachedExample(0, id, tokens, positions, targets)


def summary(teacher: str = "tiny") -> Summary:
    digest = "ab" * 32
    identity = {
        "format_version": 1, "teacher": teacher, "teacher_digest": digest, "teacher_config_digest": digest,
        "num_layers": 5, "dtype": "float32", "attn_implementation": "sdpa", "torch_version": "2",
        "device": "cpu",
        "transformers_version": "5", "tokenizer_digest": digest, "template_digest": digest, "vocab_size": 9,
        "dataset_digest": digest, "layers": LAYERS, "lens_norm": "final", "top_k": {2: 3, 5: 3},
        "store_tail": "none", "temperature": 1.0, "codec": "arrow-fp32", "seed": 0,
    }  # fmt: skip
    layers = tuple(LayerSummary(layer, 3, 100, 25.0, 0.9, 3.0, 0.5) for layer in LAYERS)
    return Summary(digest, identity, 1, 7, 4, 4 / 7, (), 1, 300, {"targets": 200, "rest": 100}, 37.5, layers)


def heat_map(pieces: list[str], *, max_positions: int = 64, **row: Any) -> HeatMap:
    return make_heat_map(example(vocab=len(pieces), **row), token_text(pieces), max_positions=max_positions)


class Page(HTMLParser):
    """What a browser would make of the page: elements, cells, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "rect"):
            self.open.append(tag)
        if tag == "td" and "data-row" in attributes:
            self.cells.append("")
        if tag == "script":
            self.scripts.append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "td" and self.elements[-1][0] == "td" and "data-row" in self.elements[-1][1]:
            self.cells[-1] += data
        if inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        if inside == "style":
            self.styles.append(data)

    @property
    def details(self) -> list[dict]:
        return [json.loads(text) for attributes, text in self.scripts if "type" in attributes]


PLAIN = [f"word{number}" for number in range(9)]


def test_the_page_has_one_cell_per_layer_and_target_with_the_last_layer_on_top() -> None:
    map_ = heat_map(PLAIN)
    page = Page(render(summary(), [map_]))
    assert page.open == []
    assert len(page.cells) == len(LAYERS) * len(map_.columns) == 2 * 4
    assert page.cells == [cell.token for row in map_.rows for cell in row.cells]
    assert [row.layer for row in map_.rows] == [5, 2]
    tops = [attributes["data-layer"] for tag, attributes in page.elements if "data-layer" in attributes]
    assert tops == ["5", "2"]
    shape = [[len(row) for row in details["rows"]] for details in page.details]
    assert shape == [[4, 4]]


def test_columns_are_headed_by_the_true_next_token_and_its_position() -> None:
    row, page = example(), Page(render(summary(), [heat_map(PLAIN)]))
    heads = [attributes for _, attributes in page.elements if "data-next" in attributes]
    positions = [2, 3, 4, 5]
    assert [head["data-position"] for head in heads] == [str(position) for position in positions]
    assert [head["data-next"] for head in heads] == [PLAIN[row.token_ids[position + 1]] for position in positions]
    assert [head["data-token"] for head in heads] == [PLAIN[row.token_ids[position]] for position in positions]


def test_a_cell_has_the_colour_of_the_true_next_token_and_is_hatched_where_that_was_not_kept() -> None:
    row = example(num_tokens=40)
    map_ = heat_map(PLAIN, num_tokens=40)
    outside = 0
    for shown in map_.rows:
        targets = row.targets[shown.layer]
        for place, cell in enumerate(shown.cells):
            kept = slice(targets.offsets[place], targets.offsets[place + 1])
            true = row.token_ids[row.target_positions[place] + 1]
            found = np.flatnonzero(targets.ids[kept] == true)
            outside += not len(found)
            assert cell.step == (step_of(float(np.exp(targets.log_probs[kept][found[0]]))) if len(found) else None)
            assert cell.is_right == (len(found) == 1 and found[0] == 0)
            assert cell.style.split()[0] == ("outside" if cell.step is None else f"s{cell.step}")
    assert 0 < outside < 2 * 37


def test_the_numbers_behind_a_cell_are_those_of_the_cache() -> None:
    row, details = example(), Page(render(summary(), [heat_map(PLAIN)])).details[0]
    for number, layer in enumerate((5, 2)):
        ids, log_probs = row.targets[layer].padded()
        for place, entry in enumerate(details["rows"][number]):
            assert [details["tokens"][token] for token, _ in entry["top"]] == [PLAIN[i] for i in ids[place]]
            assert [p for _, p in entry["top"]] == pytest.approx(np.exp(log_probs[place]), rel=6e-3)
            cells = np.append(np.exp(log_probs[place]), np.exp(row.targets[layer].log_rest[place]))
            assert entry["rest"] == pytest.approx(cells[-1], rel=6e-3)
            assert entry["entropy"] == pytest.approx(-(cells * np.log(cells)).sum(), abs=1e-3)
            true = row.token_ids[row.target_positions[place] + 1]
            assert entry.get("rank") == (list(ids[place]).index(true) + 1 if true in ids[place] else None)
            bound = cells[entry["rank"] - 1] if "rank" in entry else min(cells[-1], cells[-2])
            assert entry["next"] == pytest.approx(bound, rel=6e-3)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=20), min_size=9, max_size=9, unique=True), st.text())
def test_no_token_and_no_name_can_become_markup_or_script(pieces: list[str], name: str) -> None:
    map_ = heat_map(pieces, id=name)
    page, plain = Page(render(summary(name), [map_])), Page(render(summary(), [heat_map(PLAIN)]))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [sorted(a) for _, a in plain.elements]
    assert page.cells == [cell.token for row in map_.rows for cell in row.cells]
    assert page.details == [map_.details]
    assert [text for a, text in page.scripts if not a] == [text for a, text in plain.scripts if not a]


def test_the_page_loads_nothing_and_runs_only_its_own_script() -> None:
    text = render(summary(), [heat_map(PLAIN)])
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace("// ", ""))
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    loading = {"src", "href", "srcset", "action", "style"}
    assert not [attributes for _, attributes in page.elements if loading & attributes.keys()]
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = [text for attributes, text in page.scripts if not attributes]
    for kind, content in (("script-src", script), ("style-src", "".join(page.styles))):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_what_was_left_out_is_said_and_what_is_shown_are_the_first_targets() -> None:
    map_ = heat_map(PLAIN, max_positions=3)
    assert [column.position for column in map_.columns] == [2, 3, 4]
    text = render(summary(), [map_])
    assert "The first 3 of 4 targets; 1 left out." in text
    assert len(Page(text).cells) == 6
    assert "left out" not in render(summary(), [heat_map(PLAIN)])


def test_an_example_without_targets_has_a_sentence_instead_of_a_map() -> None:
    text = render(summary(), [heat_map(PLAIN, num_tokens=3, first_target=2)])
    assert "No target here" in text
    assert Page(text).cells == []


def test_what_is_learned_is_marked_in_the_text() -> None:
    row, map_ = example(), heat_map(PLAIN)
    words = [PLAIN[token] for token in row.token_ids]
    assert map_.text == ((False, "".join(words[:3])), (True, "".join(words[3:])))
    assert f"<mark>{''.join(words[3:])}</mark>" in render(summary(), [map_])


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("steps", [LIGHT, DARK], ids=["light", "dark"])
def test_the_scale_is_ordered_by_brightness_and_its_text_is_readable(steps: tuple[Step, ...]) -> None:
    brightness = [luminance(step.background) for step in steps]
    assert brightness == sorted(brightness, reverse=steps is LIGHT)
    assert all(max(a, b) / min(a, b) > 1.2 for a, b in itertools.pairwise(brightness))
    for step in steps:
        low, high = sorted((luminance(step.background), luminance(step.text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert len(steps) == len(EDGES) + 1 == len(step_labels())


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_a_likelier_token_never_has_a_lower_step(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= step_of(low) <= step_of(high) < len(LIGHT)


def test_equal_input_gives_equal_bytes() -> None:
    assert render(summary(), [heat_map(PLAIN)]) == render(summary(), [heat_map(PLAIN)])
