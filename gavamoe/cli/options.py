"""Options that several commands share, and the parsing of option values with an inner form."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gavamoe.errors import InputError, RunError

if TYPE_CHECKING:
    from gavamoe.config.schema import RunConfig

Json = Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON document on standard output.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a config field, e.g. stage1.beta=0.2")
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N, to write on; default: a GPU if the run trained on one and one is here."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Ray workers that write side by side; 0: this process alone. Default: 0, or with RAY_ADDRESS as many as"
        " the run trained on.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="int8, int4: fewer bytes to read for each token, on a CPU; or none. Default: the run's."),
]
ScoreStyle = Annotated[
    str | None,
    typer.Option(
        "--style",
        help="BLEU and ROUGE: sacrebleu (and rouge-score; the default), peter (as the PETER line of papers), or both.",
    ),
]


def training_config(source: str, overrides: list[str] | None) -> "RunConfig":
    """The config of a command that trains: a file or a preset, with the values of `--set`.

    Raises:
        InputError: as `load_config`; or it is a run's, and names a tracking server that nothing else names.
    """
    from gavamoe.config.files import find_config, load_config
    from gavamoe.runtime.tracking import check_tracking

    config = load_config(source, overrides or [])
    check_tracking(config, find_config(source), overrides or [])
    return config


def input_folder(text: str, *, resuming: bool = False) -> Path:
    """A local path as it is; the local copy of what is stored at a URI.

    Args:
        resuming: work whose upload was interrupted will do, for the command goes on with it.

    Raises:
        InputError: nothing is stored at the URI, or nothing whole.
    """
    from gavamoe.artifacts import remote

    path = remote.located(text, resuming=resuming)
    if remote.is_uri(text) and not path.is_dir():
        hint = "; name a folder that gavamoe did not store by its path" if text.startswith("file:") else ""
        raise InputError(f"{text}: no dataset or run is stored there{hint}")
    return path


def work_folder(text: str) -> Path:
    """A folder that the command works in; of a URI, its staging folder, which is stored there when the command ends."""
    from gavamoe.artifacts import remote

    path = remote.located(text, resuming=True)
    if remote.is_uri(text):
        _to_store[path] = text
    return path


def local_path(text: str) -> Path:
    """A local path, for commands that can't write to URIs.

    Raises:
        InputError: it is a URI.
    """
    from gavamoe.artifacts import remote

    if remote.is_uri(text):
        raise InputError(f"{text}: this command writes to local folders; take one, then `gavamoe copy` it there")
    return Path(text)


def run_folder(text: str) -> Path:
    """An existing run that the command adds to; at a URI, it is stored again when the command ends."""
    input_folder(text, resuming=True)
    return work_folder(text)


def store_work() -> None:
    """Store the work folders of the command that has ended.

    Raises:
        RunError: the storage can't be written; printed instead where the command failed itself.
    """
    if not _to_store:
        return
    from gavamoe.artifacts import remote
    from gavamoe.cli.terminal import console

    failed = isinstance(sys.exc_info()[1], Exception)
    while _to_store:
        path, uri = _to_store.popitem()
        if not path.is_dir():
            continue  # the command failed before it made anything
        try:
            remote.commit(path)
            console.print(f"stored: {uri}", markup=False, soft_wrap=True)
        except (InputError, RunError) as error:
            if not failed:
                raise
            print(f"error: {error}", file=sys.stderr)  # the command's own error follows it


_to_store: dict[Path, str] = {}
"""Work folders of the running command, and the URIs that they stand for."""

RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", parser=run_folder, help="A run folder, as `gavamoe train` makes it, or its URI."),
]
DatasetPath = Annotated[Path, typer.Option("--dataset", metavar="FOLDER", parser=input_folder, help="Dataset, or URI.")]
DatasetOfRun = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FOLDER",
        parser=input_folder,
        help="The run's dataset, if it has moved, or lies at a URI: a URI that a run names is not opened unasked.",
    ),
]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", parser=work_folder, help="Dataset folder to make, or URI.")]


def name_of(dataset: Path) -> str:
    """The name of a dataset: the last component of its path or URI."""
    from gavamoe.artifacts import remote

    stored = remote.stored_path(dataset)
    return dataset.resolve().name if stored is None else stored.uri.rsplit("/", 1)[-1]


def pairs_of(option: str, values: list[str] | None) -> dict[str, str] | None:
    """["user=uid"] -> {"user": "uid"}."""
    if not values:
        return None
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise InputError(f"{option} {value}: expected FIELD=NAME, such as user=uid")
        if name in pairs:
            raise InputError(f"{option} {value}: {name} is given twice, first as {name}={pairs[name]}")
        pairs[name] = text
    return pairs


def shares_of(text: str) -> tuple[float, float, float]:
    numbers = _numbers("--split", text, 3, "8:1:1")
    if min(numbers) < 0 or numbers[0] == 0:
        raise InputError(f"--split {text}: shares may not be negative, and that of train is above 0")
    return numbers[0], numbers[1], numbers[2]


def bounds_of(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, high = _numbers("--rating-scale", text, 2, "1:5")
    if low >= high:
        raise InputError(f"--rating-scale {text}: the first number must be below the second")
    return low, high


def counts_of(text: str) -> list[int]:
    low, high = _numbers("--sweep-clusters", text, 2, "2:8")
    if not (low.is_integer() and high.is_integer() and 1 <= low < high):
        raise InputError(f"--sweep-clusters {text}: expected two whole numbers, the first below the second")
    return list(range(int(low), int(high) + 1))


def weights_of(text: str) -> tuple[float, float, float]:
    first, second, third = _numbers("--weights", text, 3, "0.4:0.3:0.3")
    return first, second, third


def _numbers(option: str, text: str, count: int, example: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(abs(number) < 1e9 for number in numbers):
        raise InputError(f"{option} {text}: expected {count} numbers such as {example}")
    return numbers
