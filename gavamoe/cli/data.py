"""`gavamoe data ...`: make and look at datasets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gavamoe.cli.options import Json, OutPath, bounds_of, input_folder, pairs_of, shares_of

if TYPE_CHECKING:
    from gavamoe.data.judging import OrderedMap
    from gavamoe.data.readers.formats import TextMode
    from gavamoe.data.readers.sources import Quoting
    from gavamoe.data.text.features import SentenceRule

data_app = typer.Typer(help="Make and look at datasets.", no_args_is_help=True)


@data_app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Review files of one format, or their URIs; for peter the folder."),
    ],
    out: OutPath,
    format: Annotated[str, typer.Option("--format", help="amazon, yelp, peter, or table (CSV, JSONL, Parquet).")],
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=NAME",
            help="table: the column of user, item, rating, text, features, title or time; NAME -: leave the field out.",
        ),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of a text file, such as utf-16, latin-1, cp1252; default: UTF-8.")
    ] = None,
    quoting: Annotated[
        str, typer.Option(help="CSV, TSV: standard; none: quotes are text; auto: as the whole file is written.")
    ] = "auto",
    escape: Annotated[
        str | None, typer.Option(metavar="CHAR", help=r"CSV, TSV: the escape character, such as \ of MySQL and Spark.")
    ] = None,
    split: Annotated[str, typer.Option(help="Shares of train, valid and test.")] = "8:1:1",
    index_dir: Annotated[
        Path | None, typer.Option(help="Folder with train.index, validation.index, test.index to split by.")
    ] = None,
    titles: Annotated[Path | None, typer.Option(help="amazon, yelp: the file with the items' titles.")] = None,
    text_mode: Annotated[
        str | None,
        typer.Option(help="review: choose a sentence with a feature; explanation: take the text; none: no text."),
    ] = None,
    sentence: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="review: best (default): of the sentences with a feature the one most about the item, complete, of "
            "12 to 25 words, in agreement with the rating; frequent: the one with the most frequent feature.",
        ),
    ] = None,
    rating_scale: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Ratings outside are rejected.")] = None,
    max_rejected_share: Annotated[float, typer.Option(min=0, max=1, help="Fail above this share of bad rows.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    drop_users: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Leave out the users whose ids stand here, one a line.")
    ] = None,
    hash_users: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replace users' ids by hashes, with the secret in this file.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A table of more user-item pairs, without text: stage 1 alone trains on them."
        ),
    ] = None,
    pairs_column: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=NAME", help="Its column of user, item, rating or time.")
    ] = None,
    keep_textless: Annotated[
        bool,
        typer.Option("--keep-textless", help="Keep rows without a text as such pairs; default: they are rejected."),
    ] = False,
    keep_repeated_texts: Annotated[
        bool,
        typer.Option(
            "--keep-repeated-texts",
            help="review: keep explanations that their user wrote before, of another item; default: such rows become "
            "pairs without a text.",
        ),
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers that clean texts and choose sentences; 0: this process alone.")
    ] = 0,
    json_output: Json = False,
) -> None:
    """Turn raw reviews into a dataset folder: ids, splits, features, one explanation a row.

    Rows of several files are numbered through, in the order of the files.
    """
    from gavamoe.artifacts.source_files import local_files
    from gavamoe.cli.output.data import print_prepared
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.data.prepare import prepare as prepare_reviews

    with TerminalProgress() as progress, local_files(sources) as here, _side_by_side(workers) as run:
        progress.step("Prepare reviews")
        result = prepare_reviews(
            here,
            out,
            format,
            columns=pairs_of("--column", column),
            split=shares_of(split),
            index_dir=index_dir,
            titles=titles,
            text_mode=cast("TextMode | None", text_mode),
            sentence=cast("SentenceRule | None", sentence),
            rating_scale=bounds_of(rating_scale),
            max_rejected_share=max_rejected_share,
            seed=seed,
            encoding=encoding,
            quoting=cast("Quoting", quoting),  # checked there, with the other arguments
            escape=escape,
            drop_users=drop_users,
            hash_users=hash_users,
            pairs=pairs,
            pairs_columns=pairs_of("--pairs-column", pairs_column),
            keep_textless=keep_textless,
            keep_repeated_texts=keep_repeated_texts,
            progress=progress.rows,
            run=run,
        )
    print_prepared(result, out, as_json=json_output)


@contextmanager
def _side_by_side(workers: int) -> "Iterator[OrderedMap]":
    """What runs batches: this process, or Ray workers."""
    from gavamoe.data.judging import run_here

    if not workers:
        yield run_here
        return
    from gavamoe.config.schema import RuntimeConfig
    from gavamoe.runtime.ordered_tasks import OrderedTasks
    from gavamoe.runtime.ray_train import ray_session

    with ray_session(RuntimeConfig(workers=workers, threads_per_worker=1)):
        yield OrderedTasks(workers)


@data_app.command()
def synthesize(
    out: OutPath,
    users: Annotated[int, typer.Option(min=10)] = 2000,
    items: Annotated[int, typer.Option(min=10)] = 1000,
    ratings: Annotated[int, typer.Option(min=100)] = 60000,
    groups: Annotated[int, typer.Option(min=1, max=16, help="Planted user groups.")] = 3,
    gap: Annotated[float, typer.Option(min=0, help="How far the groups' tastes differ; 0.5 is hard.")] = 1.0,
    noise: Annotated[float | None, typer.Option(min=0, help="Standard deviation of the rating noise.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make reviews with planted user groups, and the truth about them in truth.json."""
    from gavamoe.cli.terminal import console
    from gavamoe.data.synthetic.generator import synthesize as make

    extra = {} if noise is None else {"noise": noise}
    make(out, users=users, items=items, ratings=ratings, groups=groups, gap=gap, seed=seed, **extra)
    console.print(f"dataset: {out}", markup=False)


@data_app.command("describe")
def describe_data(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", parser=input_folder, help="Dataset folder, or URI.")],
    json_output: Json = False,
) -> None:
    """The paper's Table 1 for a dataset, and more: density, ratings, cold users, features."""
    from gavamoe.cli.output.data import print_description
    from gavamoe.data.dataset import open_dataset
    from gavamoe.data.describe import describe

    print_description(describe(open_dataset(dataset)), as_json=json_output)
