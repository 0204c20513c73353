"""The commands of `inspect`: thin, with imports inside each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distilllens_cache import CacheFolder

CHECK_FAILED = 3
"""Exit code of a cache that is not sound."""
DIFFERENT = 1
"""Exit code of two caches that are not the same, as of diff."""


class _CacheFolder(click.Path):
    """A folder of this machine, or a URL, which is opened with the spool that the group's options say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        from distilllens_cache import open_folder
        from distilllens_cache.spool import choose_spool

        options = ctx.parent.params if ctx is not None and ctx.parent is not None else {}
        spool = choose_spool(options.get("spool_dir"), options.get("spool_bytes"))
        return open_folder(str(value), spool=spool)


_Folder = _CacheFolder(exists=True, file_okay=False, path_type=Path)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
@click.option(
    "--spool-dir",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Folder for local copies of a remote cache's files; one in the user's cache directory when not given.",
)
@click.option("--spool-bytes", type=click.IntRange(min=1), metavar="N", help="Most bytes of such copies.")
def inspect(spool_dir: Path | None, spool_bytes: int | None) -> None:
    """Look inside a teacher cache: needs neither the teacher nor a GPU. It may be a URL such as s3://bucket/cache.

    \b
    Examples:
      distilllens inspect summary cache/
      distilllens inspect show cache/ --example 0
      distilllens inspect verify cache/
      distilllens inspect report cache/ --output report.html
      distilllens inspect --spool-dir /scratch/spool summary s3://bucket/cache
      distilllens inspect diff cache/ other/
    """


@inspect.command(short_help="Identity, sizes, and what each layer holds.")
@click.argument("cache", type=_Folder)
@_as_json
def summary(cache: "Path | CacheFolder", as_json: bool) -> None:
    """Show what CACHE holds: identity, examples, targets, bytes, and each layer's mass and entropy.

    \b
    Examples:
      distilllens inspect summary cache/
      distilllens inspect summary cache/ --json
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.console import make_console, print_json
    from distilllens_inspect.summary import print_summary, summarize

    found = summarize(CacheReader(cache))
    if as_json:
        print_json(found.to_json())
    else:
        print_summary(found, make_console())


@inspect.command(short_help="One example: its tokens and what the teacher says.")
@click.argument("cache", type=_Folder)
@click.option("--example", type=int, required=True, metavar="N", help="Which example, from 0.")
@click.option(
    "--positions",
    metavar="RANGE|LIST",
    help="Target positions: 40:48 for those from 40 to 47, or 41,45. Default: the first four.",
)
@click.option("--layers", metavar="LIST", help="Teacher layers such as 4,8. Default: all of the cache.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Tokens per layer.")
@_as_json
def show(
    cache: "Path | CacheFolder", example: int, positions: str | None, layers: str | None, top: int, as_json: bool
) -> None:
    """Show one example of CACHE: its tokens, what is learned of them, and what the teacher says there.

    Spaces in tokens are shown as ·, line breaks as \\n.

    \b
    Examples:
      distilllens inspect show cache/ --example 0
      distilllens inspect show cache/ --example 3 --positions 40:48 --layers 8,16 --top 3
      distilllens inspect show cache/ --example 3 --json
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.choose import check_example, choose_layers, choose_positions
    from distilllens_inspect.console import make_console, print_json
    from distilllens_inspect.show import print_example, show_json

    reader = CacheReader(cache)
    found = reader[check_example(example, len(reader))]
    chosen_layers = choose_layers(layers, reader.manifest.identity.layers)
    chosen = choose_positions(positions, found)
    if as_json:
        print_json(show_json(reader, found, chosen, chosen_layers, top))
    else:
        print_example(reader, found, chosen, chosen_layers, top, make_console())


@inspect.command(short_help="Check every file; exit code 3 if one is bad.")
@click.argument("cache", type=_Folder)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Shards checked, and held in memory, at a time. Default: one a core.",
)
@_as_json
@click.pass_context
def verify(context: click.Context, cache: "Path | CacheFolder", workers: int | None, as_json: bool) -> None:
    """Check all of CACHE: digests, schema, meaning, sums, and whether targets and text belong together.

    Ends with exit code 3 and names each bad file when something is wrong; `cache-teacher --repair` writes those again.

    \b
    Examples:
      distilllens inspect verify cache/
      distilllens inspect verify cache/ --workers 2 --json
    """
    from distilllens_inspect.console import make_console, print_json
    from distilllens_inspect.verify import check, print_verify, verify_json

    found = check(cache, workers=workers)
    if as_json:
        print_json(verify_json(found))
    else:
        print_verify(found, cache, make_console())
    if not found.is_sound:
        context.exit(CHECK_FAILED)


@inspect.command(short_help="Write one HTML page with heat maps and curves.")
@click.argument("cache", type=_Folder, required=False)
@click.option("--run", type=_Folder, metavar="RUN", help="Output folder of `distilllens train`, done or under way.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="The page to write. [report.html in RUN]"
)
@click.option("--examples", metavar="LIST", help="Examples such as 0,1,2. Default: the first ones.")
@click.option(
    "--num-examples",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How many of the first examples, where --examples names none.",
)
@click.option(
    "--max-positions",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most targets shown of one example.",
)
def report(
    cache: "Path | CacheFolder | None",
    run: Path | None,
    output: Path | None,
    examples: str | None,
    num_examples: int,
    max_positions: int,
) -> None:
    """Write one HTML page about CACHE, about RUN, or about both. It needs no network.

    Of a cache it shows numbers, and heat maps of layers by tokens; of a training run the curves, and the student's
    lens beside the teacher's, layer pair by token.

    \b
    Examples:
      distilllens inspect report cache/ --output report.html
      distilllens inspect report --run run/
      distilllens inspect report cache/ --run run/ --output report.html
      distilllens inspect report cache/ --output report.html --examples 0,7,12 --max-positions 200
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.choose import choose_examples
    from distilllens_inspect.console import bytes_text
    from distilllens_inspect.report import write_report

    if cache is None and run is None:
        raise click.UsageError("nothing to report on: give a cache, --run, or both")
    if output is None:
        if run is None:
            raise click.UsageError("say where the page goes: --output FILE")
        output = run / "report.html"
    reader = CacheReader(cache) if cache is not None else None
    chosen = choose_examples(examples, num_examples, len(reader)) if reader is not None else []
    size = write_report(reader, output, examples=chosen, max_positions=max_positions, run=run)
    click.echo(f"Wrote {output} ({bytes_text(size)}). Open it in a browser.")


@inspect.command(short_help="Write one Parquet file for other tools.")
@click.argument("cache", type=_Folder)
@click.option("--to", type=click.Choice(["parquet"]), default="parquet", show_default=True, help="Format of the file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="File to write.")
def export(cache: "Path | CacheFolder", to: str, output: Path) -> None:
    """Write CACHE, decoded, as one Parquet file: a row per example, lists of ids and log-probabilities per layer.

    Codes of sketches and draws from the tail are columns too, where the cache stores them. The file opens with
    datasets.load_dataset("parquet", data_files=FILE).

    \b
    Examples:
      distilllens inspect export cache/ --to parquet --output cache.parquet
      distilllens inspect export cache/ --output /data/teacher.parquet
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.console import bytes_text
    from distilllens_inspect.export import export_parquet

    reader = CacheReader(cache)
    size = export_parquet(reader, output)
    click.echo(f"Wrote {output} ({bytes_text(size)}): {len(reader)} examples.")


@inspect.command(short_help="Compare two caches; exit code 1 if they differ.")
@click.argument("a", type=_Folder)
@click.argument("b", type=_Folder)
@_as_json
@click.pass_context
def diff(context: click.Context, a: Path, b: Path, as_json: bool) -> None:
    """Compare the caches A and B: the same identity? the same examples? the same targets?

    They may be of two teachers, or of one with other settings. Examples are paired by tokens and target positions,
    layers by number, last layers with each other. Per layer: how far log-probabilities differ, how many rows keep
    other ids, and the JSD in nats between the targets. It is computed over the ids that both keep and one bucket for
    everything else of each side (its rest, and what only it keeps), which makes it a lower bound of the JSD of the
    whole distributions.

    Ends with exit code 0 if identity, examples, targets and stored tails are the same, 1 if not.

    \b
    Examples:
      distilllens inspect diff cache/ other/
      distilllens inspect diff cache/ other/ --json
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.console import make_console, print_json
    from distilllens_inspect.diff import diff_caches, print_diff

    found = diff_caches(CacheReader(a), CacheReader(b))
    if as_json:
        print_json(found.to_json())
    else:
        print_diff(found, make_console())
    if not found.is_same:
        context.exit(DIFFERENT)


@inspect.command(short_help="Print a dataset card for a model hub.")
@click.argument("cache", type=_Folder)
@click.option("--license", "license_name", metavar="NAME", help="License to name in it, such as apache-2.0.")
def card(cache: Path, license_name: str | None) -> None:
    """Print a dataset card (README.md) of CACHE: what it holds, how to use it, its digests.

    \b
    Examples:
      distilllens inspect card cache/
      distilllens inspect card cache/ --license apache-2.0 > README.md
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.card import render_card

    click.echo(render_card(CacheReader(cache), license_name=license_name), nl=False)
