"""The commands of `inspect` on a small real cache: what they say, what they refuse, how they end."""

import json
import os
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from tokenizers import Tokenizer, models

from distilllens_cache import (
    FIXED_POINT,
    CachedExample,
    CacheError,
    CacheReader,
    CacheWriter,
    Identity,
    LayerTargets,
    PlannedExample,
    example_digest,
)
from distilllens_inspect import report as report_module
from distilllens_inspect.commands import inspect
from distilllens_inspect.show import print_example

WORDS = ["[unk]", "the", " cat", " sat", "\n", " on", " mat", ".", " a", "</script>", " dog", "\x1b[2J"]
LAYERS, TOP_K = (2, 4), {2: 2, 4: 3}
TOKENS = [[1, 2, 3, 5, 1, 6, 7], [1, 10, 4, 9, 3], [8, 2]]
TARGETS = [[2, 3, 5], [1, 2], []]
"""Target positions of the three examples; the last has none. In the first, position 4 is left out."""


def layer_targets(tokens: list[int], positions: list[int], layer: int) -> LayerTargets:
    """At layer 4 the true next token leads with 0.6; at layer 2 it is not kept."""
    k, ids, masses = TOP_K[layer], [], []
    for position in positions:
        true = tokens[position + 1]
        others = [token for token in range(len(WORDS)) if token != true]
        ids += [true, *others[: k - 1]] if layer == 4 else others[:k]
        masses += [0.6, 0.2, 0.1][:k] if layer == 4 else [0.5, 0.25]
    rest = np.full(len(positions), 0.1 if layer == 4 else 0.25)
    return LayerTargets(
        counts=np.full(len(positions), k, np.int32),
        ids=np.array(ids, np.uint32),
        log_probs=np.log(np.array(masses)).astype(np.float32),
        log_rest=np.log(rest).astype(np.float32),
    )


def write_cache(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[unk]"))
    examples = [
        CachedExample(
            index=number,
            id=f"row-{number}",
            token_ids=np.array(tokens, np.uint32),
            target_positions=np.array(positions, np.uint32),
            targets={layer: layer_targets(tokens, positions, layer) for layer in LAYERS},
        )
        for number, (tokens, positions) in enumerate(zip(TOKENS, TARGETS, strict=True))
    ]
    planned = [
        PlannedExample(e.id, example_digest(e.token_ids, e.target_positions), len(e.token_ids), len(t))
        for e, t in zip(examples, TARGETS, strict=True)
    ]
    identity = Identity(
        teacher="a tiny teacher", teacher_digest="11" * 32, teacher_config_digest="22" * 32, num_layers=4,
        dtype="float32", attn_implementation="sdpa", torch_version="2.13", transformers_version="5.23",
        device="cpu", tokenizer_digest="33" * 32, template_digest="44" * 32, vocab_size=len(WORDS),
        dataset_digest="55" * 32, layers=LAYERS, lens_norm="final", top_k=TOP_K, store_tail="profile",
        temperature=1.0, codec="arrow-fp32", batch_tokens=64, examples_per_shard=2, seed=0,
    )  # fmt: skip
    shards = [range(2), range(2, 3)]
    writer = CacheWriter(
        folder,
        identity=identity,
        examples=planned,
        tokenizer_files={"tokenizer.json": tokenizer.to_str().encode()},
        shards=shards,
    )
    for number, shard in enumerate(shards):
        num_targets = sum(len(TARGETS[place]) for place in shard)
        writer.write_shard(number, [examples[place] for place in shard], tail_sums(num_targets))
    writer.finish()
    return folder


def tail_sums(num_targets: int) -> dict[int, np.ndarray]:
    sums = {}
    for layer, rest in ((2, 0.25), (4, 0.1)):
        sums[layer] = np.zeros(len(WORDS), np.int64)
        sums[layer][11] = round(num_targets * rest * FIXED_POINT)
    return sums


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("inspect") / "cache")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result.stdout


def refused(result: Result) -> str:
    """The sentence that `distilllens` prints after "Error:"."""
    assert isinstance(result.exception, CacheError | ValueError)
    assert result.stdout == ""
    return str(result.exception)


def test_the_summary_counts_targets_mass_ids_entropy_and_every_byte(cache: Path) -> None:
    found = json.loads(said(run("summary", cache, "--json")))
    assert (found["num_examples"], found["num_tokens"], found["num_targets"]) == (3, 14, 5)
    assert found["target_share"] == pytest.approx(5 / 14)
    assert found["without_targets"] == ["row-2"]
    assert sum(found["bytes_of"].values()) == found["total_bytes"]
    assert min(found["bytes_of"].values()) > 0
    shards = [cache / f"shards/0000{number}.arrow" for number in (0, 1)]
    shard_bytes = sum(path.stat().st_size for path in shards)
    assert found["bytes_per_target_and_layer"] == pytest.approx(shard_bytes / (5 * 2))
    tails = [*(path.with_suffix(".tails.arrow") for path in shards), cache / "tail_sums.arrow"]
    assert found["bytes_of"]["tail sums"] == sum(path.stat().st_size for path in tails)
    early, final = found["layers"]
    assert (early["layer"], early["mean_num_ids"], final["layer"], final["mean_num_ids"]) == (2, 2, 4, 3)
    assert early["mean_kept_mass"] == pytest.approx(0.75)
    assert final["mean_kept_mass"] == pytest.approx(0.9)
    cells = np.array([0.6, 0.2, 0.1, 0.1])
    assert final["mean_entropy"] == pytest.approx(-(cells * np.log(cells)).sum(), abs=1e-6)
    assert final["bytes_per_target"] == final["bytes"] / 5


def test_the_summary_for_people_names_the_identity_and_warns_of_rows_that_teach_nothing(cache: Path) -> None:
    text = said(run("summary", cache))
    for part in ("a tiny teacher", "11" * 32, "2, 4 of 4", "profile", "transformers 5.23", "lower bound"):
        assert part in text
    assert "5 (35.7% of tokens are supervised)" in text
    assert "Warning: 1 of 3 examples has no target, so nothing is learned there: row-2." in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


GOLDEN_SKETCH = Path(__file__).parents[1] / "golden" / "cache_v1_sketch"


def test_the_summary_tells_what_is_stored_of_the_tail_of_each_layer() -> None:
    text = said(run("summary", GOLDEN_SKETCH))
    assert "profile+sampled:5 (layer 2); sketch:4:8 (layer 3); profile+sketch:5+sampled:8 (layer 4)" in text
    assert "0.001 (layer 2)" in text
    assert "100 targets" in text
    assert [line.split()[-1] for line in text.splitlines() if line.strip().startswith(("2 ", "3 ", "4 "))] == [
        *("profile+sampled:5", "sketch:4:8", "profile+sketch:5+sampled:8"),
    ]
    found = json.loads(said(run("summary", GOLDEN_SKETCH, "--json")))
    assert [layer["tail"] for layer in found["layers"]] == [*found["identity"]["store_tail"].values()]
    assert sum(found["bytes_of"].values()) == found["total_bytes"]
    rows = GOLDEN_SKETCH.glob("shards/*.tail_rows.arrow")
    assert found["bytes_of"]["tail rows"] == sum(path.stat().st_size for path in rows)
    sketches = GOLDEN_SKETCH.glob("sketches/*.arrow")
    assert found["bytes_of"]["sketches"] == sum(path.stat().st_size for path in sketches)


def test_the_json_of_a_summary_has_every_field_of_the_identity(cache: Path) -> None:
    found = json.loads(said(run("summary", cache, "--json")))
    assert set(found["identity"]) == set(Identity.model_fields)
    assert {layer["tail"] for layer in found["layers"]} == {found["identity"]["store_tail"]} == {"profile"}


def test_what_is_learned_stands_between_marks_where_there_is_no_colour(cache: Path) -> None:
    text = said(run("show", cache, "--example", "0"))
    assert "the·cat·sat[[·onthe]]·mat[[.]]" in text
    assert "\x1b" not in text
    assert "7 tokens, 3 supervised (42.9%)" in text


def test_colours_replace_the_marks_and_no_color_brings_them_back(cache: Path) -> None:
    reader = CacheReader(cache)

    def shown(*, no_color: bool = False) -> str:
        file = StringIO()
        console = Console(
            file=file,
            force_terminal=True,
            color_system="truecolor",
            width=100,
            no_color=no_color,
            _environ={},
        )
        print_example(reader, reader[0], [2], [4], 3, console)
        return file.getvalue()

    assert "\x1b[1;32mthe\x1b[0m·mat\x1b[1;32m.\x1b[0m" in shown()
    assert "[[" not in shown()
    assert "[[·onthe]]" in shown(no_color=True)


def test_tokens_cannot_reach_the_terminal_as_commands_or_line_breaks(cache: Path) -> None:
    text = said(run("show", cache, "--example", "1", "--top", "12"))
    assert "\x1b" not in text
    assert "\\n" in text
    assert "</script>" in text


def test_the_table_gives_the_next_tokens_probability_and_says_when_it_was_not_kept(cache: Path) -> None:
    lines = said(run("show", cache, "--example", "0", "--positions", "3")).splitlines()
    assert "Position 3: after ·on the true next token is the" in lines
    final, early = (next(line for line in lines if line.split()[:1] == [layer]) for layer in ("4", "2"))
    assert final.split() == "4 0.600 (#1) the 0.600 [unk] 0.200 ·cat 0.100 0.100 1.09".split()
    assert early.split() == "2 outside top-2 [unk] 0.500 ·cat 0.250 0.250 1.04".split()
    assert lines.index(final) < lines.index(early)


def test_the_table_fits_a_narrow_terminal_and_says_what_it_left_out(cache: Path) -> None:
    reader = CacheReader(cache)
    file = StringIO()
    console = Console(file=file, width=60, no_color=True)
    print_example(reader, reader[0], [2], [2, 4], 3, console)
    text = file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 60
    assert "1 of the top 3 fit this width" in " ".join(text.split())


def test_json_gives_exact_tokens_and_probabilities(cache: Path) -> None:
    found = json.loads(said(run("show", cache, "--example", "1", "--layers", "4", "--top", "2", "--json")))
    assert [token["text"] for token in found["tokens"]] == [WORDS[token] for token in TOKENS[1]]
    assert [token["is_supervised"] for token in found["tokens"]] == [False, False, True, True, False]
    first = found["positions"][0]
    assert (first["position"], first["token"]["text"], first["next"]["text"]) == (1, " dog", "\n")
    (layer,) = first["layers"]
    assert layer["next_rank"] == 1
    assert [token["probability"] for token in layer["top"]] == pytest.approx([0.6, 0.2])
    assert (layer["num_ids"], layer["rest"]) == (3, pytest.approx(0.1))


def test_positions_are_chosen_by_range_or_list_and_are_the_first_by_default(cache: Path) -> None:
    def positions(*arguments: str) -> list[int]:
        found = json.loads(said(run("show", cache, "--example", "0", "--json", *arguments)))
        return [place["position"] for place in found["positions"]]

    assert positions() == [2, 3, 5]
    assert positions("--positions", "3:6") == positions("--positions", "3:") == [3, 5]
    assert positions("--positions", ":3") == [2]
    assert positions("--positions", "5,2") == [2, 5]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--example", "3"], "there is no example 3; this cache has 3, from 0 to 2."),
        (["--example", "-1"], "there is no example -1; this cache has 3, from 0 to 2."),
        (["--example", "0", "--layers", "4,7"], "the cache has no layer 7; choose --layers among 2, 4."),
        (["--example", "0", "--layers", "x"], "--layers has 'x', which is no whole number from 0."),
        (["--example", "0", "--layers", ","], "--layers is empty; expected are layers such as 4,8."),
        (
            ["--example", "0", "--positions", "4"],
            "position 4 is no target position: example 0 has 3 of them, from 2 to 5.",
        ),
        (
            ["--example", "0", "--positions", "90:99"],
            "no target position lies in 90:99: example 0 has 3 of them, from 2 to 5.",
        ),
        (["--example", "0", "--positions", "1:b"], "--positions has 'b', which is no whole number from 0."),
        (
            ["--example", "2", "--positions", "0"],
            "example 2 has no target position; --positions 0 finds nothing.",
        ),
    ],
)
def test_a_wrong_choice_is_refused_with_what_there_is(cache: Path, arguments: list[str], sentence: str) -> None:
    assert refused(run("show", cache, *arguments)) == sentence


def test_an_example_without_targets_is_shown_with_a_warning(cache: Path) -> None:
    text = said(run("show", cache, "--example", "2"))
    assert "·a·cat" in text
    assert "Warning: no target here" in text


def test_a_sound_cache_passes_with_exit_code_0(cache: Path) -> None:
    result = run("verify", cache)
    assert "is sound" in said(result)
    assert result.stderr == ""
    found = json.loads(said(run("verify", cache, "--json")))
    assert found["is_sound"]
    assert found["problems"] == []


DAMAGED = ["shards/00000.arrow", "shards/00001.json", "tokenizer/tokenizer.json", "tail_sums.arrow"]


@pytest.mark.parametrize("name", DAMAGED)
def test_each_damaged_file_is_named_and_the_exit_code_is_3(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / "cache")
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    result = run("verify", folder)
    assert result.exit_code == 3
    assert name in result.stdout
    assert "failed with" in result.stdout
    result = run("verify", folder, "--json")
    assert result.exit_code == 3
    assert name in [problem["file"] for problem in json.loads(result.stdout)["problems"]]


def test_two_bad_files_get_a_line_each(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "cache")
    (folder / "shards/00001.arrow").unlink()
    (folder / "tail_sums.arrow").write_bytes(b"")
    lines = run("verify", folder).stdout.splitlines()
    assert any(line.startswith("shards/00001.arrow") for line in lines)
    assert any(line.startswith("tail_sums.arrow") for line in lines)


def test_a_folder_that_is_no_cache_is_said_to_be_none(tmp_path: Path) -> None:
    assert "not a teacher cache" in refused(run("summary", tmp_path))
    result = run("verify", tmp_path)
    assert result.exit_code == 3
    assert "not a teacher cache" in result.stdout
    assert run("summary", tmp_path / "missing").exit_code == 2


def test_the_report_has_equal_bytes_each_time_and_replaces_an_old_one(cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    assert "Open it in a browser." in said(run("report", cache, "--output", page))
    again = tmp_path / "again.html"
    said(run("report", cache, "--output", again))
    assert page.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html", "report.html"]
    text = page.read_text(encoding="utf-8")
    assert [f'id="example-{number}"' in text for number in range(3)] == [True] * 3


def test_the_report_holds_the_examples_asked_for(cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    for arguments, expected in (["--examples", "1"], [1]), (["--num-examples", "2"], [0, 1]):
        said(run("report", cache, "--output", page, *arguments))
        text = page.read_text(encoding="utf-8")
        assert [number for number in range(3) if f'id="example-{number}"' in text] == expected
    assert "no example 5" in refused(run("report", cache, "--output", page, "--examples", "1,5"))


def test_a_report_that_cannot_be_written_is_refused_with_a_sentence(cache: Path, tmp_path: Path) -> None:
    assert "is a folder; --output names a file" in refused(run("report", cache, "--output", tmp_path))
    assert "is no folder. Make it first." in refused(run("report", cache, "--output", tmp_path / "a" / "b.html"))
    assert "is no ordinary file" in refused(run("report", cache, "--output", "/dev/null"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_page(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(report_module.os, "fsync", full)
    assert "No space left" in refused(run("report", cache, "--output", page))
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


COMMANDS = ["summary", "show", "verify", "report", "export", "diff", "card"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_at_the_end_of_each_help_are_valid_commands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    text = said(run(name, "--help"))
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("distilllens inspect")]
    assert len(examples) >= 2
    for example in examples:
        _, _, command, *arguments = shlex.split(example.partition(" > ")[0])
        assert command == name
        inspect.commands[name].make_context(name, arguments).close()


def test_the_group_lists_its_commands() -> None:
    assert isinstance(inspect, click.Group)
    assert sorted(inspect.commands) == sorted(COMMANDS)


def test_looking_inside_a_cache_loads_neither_torch_nor_transformers(cache: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from distilllens_inspect.commands import inspect\n"
        "cache, page = sys.argv[1:]\n"
        "for more in (['summary'], ['verify'], ['show', '--example', '0'], ['report', '--output', page]):\n"
        "    inspect.main([*more, cache], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'distilllens'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(cache), str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
