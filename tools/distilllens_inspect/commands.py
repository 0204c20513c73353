"""The commands `inspect summary`, `show`, `verify` and `report`: thin, with imports inside each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distilllens_cache import CacheFolder

CHECK_FAILED = 3
"""Exit code of a cache that is not sound."""


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
@_as_json
@click.pass_context
def verify(context: click.Context, cache: "Path | CacheFolder", as_json: bool) -> None:
    """Check all of CACHE: digests, schema, meaning, sums, and whether targets and text belong together.

    Ends with exit code 3 and names each bad file when something is wrong.

    \b
    Examples:
      distilllens inspect verify cache/
      distilllens inspect verify cache/ --json
    """
    from distilllens_inspect.console import make_console, print_json
    from distilllens_inspect.verify import check, print_verify, verify_json

    found = check(cache)
    if as_json:
        print_json(verify_json(found))
    else:
        print_verify(found, cache, make_console())
    if not found.is_sound:
        context.exit(CHECK_FAILED)


@inspect.command(short_help="Write one HTML page with heat maps.")
@click.argument("cache", type=_Folder)
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The page to write.")
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
    cache: "Path | CacheFolder", output: Path, examples: str | None, num_examples: int, max_positions: int
) -> None:
    """Write one HTML page about CACHE: its numbers, and heat maps of layers by tokens. It needs no network.

    \b
    Examples:
      distilllens inspect report cache/ --output report.html
      distilllens inspect report cache/ --output report.html --examples 0,7,12 --max-positions 200
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.choose import choose_examples
    from distilllens_inspect.console import bytes_text
    from distilllens_inspect.report import write_report

    reader = CacheReader(cache)
    chosen = choose_examples(examples, num_examples, len(reader))
    size = write_report(reader, output, examples=chosen, max_positions=max_positions)
    click.echo(f"Wrote {output} ({bytes_text(size)}). Open it in a browser.")


@inspect.command()
@click.argument("cache", type=_Folder)
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Parquet file to write.")
def export(cache: "Path | CacheFolder", output: Path) -> None:
    """Write CACHE, decoded, as one Parquet file: a row per example, lists of ids and log-probabilities per layer.

    \b
    Examples:
      distilllens inspect export cache/ --output cache.parquet
      distilllens inspect export cache/ --output /data/teacher.parquet
    """
    from distilllens_cache import CacheReader
    from distilllens_inspect.console import bytes_text
    from distilllens_inspect.export import export_parquet

    reader = CacheReader(cache)
    size = export_parquet(reader, output)
    click.echo(f"Wrote {output} ({bytes_text(size)}): {len(reader)} examples.")
