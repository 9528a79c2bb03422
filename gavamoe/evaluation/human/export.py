"""`gavamoe human-eval export`: blind sheets for raters, and a key that is kept apart.

OUT/ goes to the raters: guide.md, and for each of them rater-N.csv and rater-N.html, the same texts in another order.
The HTML form needs no server and no network: it keeps its answers in the browser and saves them as a CSV.
Systems that wrote the same text for a row are rated once.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.artifacts.files import write_folder, write_json
from gavamoe.artifacts.run import open_run
from gavamoe.data.dataset import Dataset, dataset_of_run
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluated_run import RunData, distinct_names, read_run
from gavamoe.evaluation.human.study import CRITERIA, FORMAT, REFERENCE, SCALE, Key, KeyText

_TEMPLATE = Path(__file__).with_name("human_form.html.jinja")
_CONTEXT = ("id", "item", "features", "rating", "earlier_reviews", "text")


@dataclass(frozen=True)
class Question:
    """One text to rate, with what a rater may know about it."""

    id: str
    item: str
    features: str
    rating: str
    earlier_reviews: tuple[str, ...]
    text: str


def export_study(
    runs: Sequence[Path],
    out: Path,
    *,
    rows: int = 100,
    raters: int = 3,
    seed: int = 0,
    reference: bool = False,
    history: int = 3,
    dataset: Path | None = None,
) -> tuple[Path, Key]:
    """Write the raters' folder `out` and, beside it, its key; returns the key's path and content.

    Args:
        rows: of the split, drawn by the seed among those that all runs wrote for.
        reference: let the references take part as one more system.
        history: earlier reviews of the user to show, from the training split; 0: none, and no dataset is read.
        dataset: where the runs' dataset is now, if it moved.

    Raises:
        InputError: fewer than two systems, runs on other data or without common rows, or `out` or its key exists.
    """
    data = distinct_names([read_run(Path(run)) for run in runs])
    if len(data) + reference < 2:
        raise InputError("human-eval export: needs two systems to compare: name two runs, or add --reference")
    key_path = Path(out).with_name(Path(out).name + ".key.json")
    if key_path.exists():
        raise InputError(f"{key_path}: already exists; choose another folder or remove it first")
    chosen = _common_rows(data, rows, seed)
    opened = dataset_of_run(open_run(runs[0]), dataset) if history else None
    earlier = _Earlier(opened, history) if opened else None
    key, questions = _questions(data, chosen, seed, reference, earlier)
    with write_folder(Path(out)) as folder:
        (folder / "guide.md").write_text(guide(), encoding="utf-8")
        for rater in range(1, raters + 1):
            order = np.random.default_rng([seed, rater]).permutation(len(questions))
            shuffled = [questions[index] for index in order]
            _write_sheet(folder / f"rater-{rater}.csv", shuffled)
            (folder / f"rater-{rater}.html").write_text(
                form(shuffled, f"rater-{rater}", _study_id(key)), encoding="utf-8"
            )
    write_json(key_path, key.model_dump(mode="json"))
    return key_path, key


def guide() -> str:
    """Table 6 as Markdown."""
    parts = [
        "# How to rate\n\nEach text says why an item is recommended to a user. Rate it by three criteria from 1 to 5;"
        " half points are welcome. Texts come in random order, and you are not told what wrote them.\n"
    ]
    for criterion in CRITERIA:
        levels = "\n".join(f"| {5 - step} | {text} |" for step, text in enumerate(criterion.levels))
        parts.append(
            f"## {criterion.name} ({criterion.letter})\n\n{criterion.question}\n\n| score | |\n|---|---|\n{levels}\n"
        )
    return "\n".join(parts)


def form(questions: Sequence[Question], rater: str, study: str) -> str:
    """The self-contained page of one rater; its only script is allowed by its hash."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        questions=questions, rater=rater, study=study, criteria=CRITERIA, scale=SCALE, script_hash="SCRIPT-HASH"
    )
    script = page.split("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT-HASH", digest, 1)


def _study_id(key: Key) -> str:
    """Answers of another study in the same browser are not taken for this one's."""
    return hashlib.sha256(key.model_dump_json().encode()).hexdigest()[:12]


def _common_rows(data: Sequence[RunData], rows: int, seed: int) -> list[int]:
    """Row numbers of the split, in random order."""
    first = data[0]
    for run in data[1:]:
        for name, value in (("dataset", run.metrics["dataset"]["fingerprint"]), ("split", run.metrics["split"])):
            other = first.metrics["dataset"]["fingerprint"] if name == "dataset" else first.metrics["split"]
            if value != other:
                raise InputError(f"{run.name}: evaluated on another {name} than {first.name}; raters compare like rows")
    common = set.intersection(*(set(run.generations["row"].to_pylist()) for run in data))
    if not common:
        raise InputError("the runs have no row in common; evaluate them on the same rows")
    order = np.random.default_rng(seed).permutation(sorted(common))
    return [int(row) for row in order[:rows]]


def _questions(
    data: Sequence[RunData], chosen: Sequence[int], seed: int, reference: bool, earlier: "_Earlier | None"
) -> tuple[Key, list[Question]]:
    """The key and the questions, in one shuffled order: ids say nothing about rows or systems."""
    by_row = [{row["row"]: row for row in run.generations.to_pylist() if row["row"] in set(chosen)} for run in data]
    to_rate: list[tuple[int, str, list[str]]] = []
    for row in chosen:
        systems_of_text: dict[str, list[str]] = {}
        for run, rows in zip(data, by_row, strict=True):
            systems_of_text.setdefault(" ".join(rows[row]["generated"].split()), []).append(run.name)
        if reference:
            systems_of_text.setdefault(" ".join(by_row[0][row]["reference"].split()), []).append(REFERENCE)
        to_rate += [(row, text, systems) for text, systems in systems_of_text.items()]
    order = np.random.default_rng([seed, 0]).permutation(len(to_rate))
    texts, questions = [], []
    for number, index in enumerate(order, start=1):
        row, text, systems = to_rate[index]
        texts.append(KeyText(id=f"t{number:04d}", row=row, systems=tuple(systems)))
        questions.append(_question(f"t{number:04d}", by_row[0][row], text, earlier))
    key = Key(
        format=FORMAT,
        dataset=data[0].metrics["dataset"]["fingerprint"],
        split=data[0].metrics["split"],
        seed=seed,
        systems=tuple([run.name for run in data] + ([REFERENCE] if reference else [])),
        texts=tuple(texts),
    )
    return key, questions


def _question(name: str, row: dict[str, Any], text: str, earlier: "_Earlier | None") -> Question:
    return Question(
        id=name,
        item=row["title"] or row["item"],
        features=", ".join(row["features"] or ()),
        rating="" if row["rating"] is None else f"{row['rating']:g}",
        earlier_reviews=earlier.of(row["user"]) if earlier else (),
        text=text or "(nothing)",
    )


class _Earlier:
    """Training reviews by user, the longest first: they say most."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        table = dataset.table("train", ["user", "item", "rating", "text"])
        self._catalog, self._count = dataset.catalog, count
        self._rows: dict[int, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            if row["text"] and row["text"].strip():
                self._rows.setdefault(row["user"], []).append(row)

    def of(self, user: str) -> tuple[str, ...]:
        index = self._catalog.user_index(user)
        rows = sorted(self._rows.get(-1 if index is None else index, []), key=lambda row: -len(row["text"]))
        return tuple(self._line(row) for row in rows[: self._count])

    def _line(self, row: dict[str, Any]) -> str:
        title = self._catalog.item_title(row["item"]) or self._catalog.item_id(row["item"])
        rating = "" if row["rating"] is None else f" ({row['rating']:g})"
        return f"{title}{rating}: {row['text']}"


def _write_sheet(path: Path, questions: Sequence[Question]) -> None:
    rows = []
    for question in questions:
        values = [getattr(question, name) for name in _CONTEXT]
        rows.append([*(" | ".join(v) if isinstance(v, tuple) else v for v in values), *[""] * len(CRITERIA)])
    write_csv(path, [*_CONTEXT, *(criterion.name for criterion in CRITERIA)], rows, mark=True)
