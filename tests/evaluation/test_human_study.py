"""Human evaluation: blind sheets, a key apart, and an import that trusts no sheet."""

import asyncio
import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import CHROMIUM, chromium
from helpers.pages import HOSTILE, Page
from helpers.writers import FakeExplainer, parrot

from gavamoe.artifacts.files import write_json
from gavamoe.config.files import dump_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluate import evaluate, write_evaluation
from gavamoe.evaluation.human.export import export_study
from gavamoe.evaluation.human.results import HUMAN_SCORE, import_study, krippendorff_alpha, read_sheet
from gavamoe.evaluation.human.study import CRITERIA, Key, read_key
from gavamoe.generation.request import ExplanationRequest

NAMES = [criterion.name for criterion in CRITERIA]
NONE = np.nan


def make_run(folder: Path, dataset: Dataset, text: Callable[[ExplanationRequest], str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(RunConfig()))
    write_json(folder / "dataset.json", {"path": str(dataset.path), "fingerprint": dataset.fingerprint})
    write_evaluation(
        folder / "evaluation", evaluate(FakeExplainer(dataset, text), dataset, RunConfig()), RunConfig(), {}
    )
    return folder


@pytest.fixture(scope="module")
def runs(planted: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    work = tmp_path_factory.mktemp("runs")
    said = parrot(planted)
    return [
        make_run(work / "okapi", planted, said),
        make_run(work / "tapir", planted, lambda request: f"=HYPERLINK({request.item})"),
        make_run(work / "zebra", planted, lambda request: said(request) if request.user % 2 else "Fine."),
    ]


@pytest.fixture
def study(runs: list[Path], tmp_path: Path) -> tuple[Path, Path, Key]:
    out = tmp_path / "study"
    key_file, key = export_study(runs, out, rows=12, raters=2, reference=True)
    return out, key_file, key


def sheet(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_sheet(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", *NAMES], *lines])
    return path


def test_sheets_are_blind_shuffled_and_apart_from_the_key(study: tuple[Path, Path, Key], runs: list[Path]) -> None:
    out, key_file, key = study
    assert sorted(path.name for path in out.iterdir()) == [
        "guide.md", "rater-1.csv", "rater-1.html", "rater-2.csv", "rater-2.html",
    ]  # fmt: skip
    assert key_file.parent == out.parent
    for path in out.iterdir():
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8").lower()))
        assert not words & {"okapi", "tapir", "zebra", "reference"}, path
    one, two = sheet(out / "rater-1.csv"), sheet(out / "rater-2.csv")
    assert [row["id"] for row in one] != [row["id"] for row in two]
    assert {row["id"] for row in one} == {row["id"] for row in two} == {text.id for text in key.texts}
    assert all(row[name] == "" for row in one for name in NAMES)
    # In the order of ids, systems alternate as chance has it: no run of one system's texts, no order of rows.
    order = [text.systems[0] for text in key.texts]
    assert 4 < sum(a != b for a, b in itertools.pairwise(order)) < len(order)
    assert [text.row for text in key.texts] != sorted(text.row for text in key.texts)


def test_equal_texts_are_rated_once(study: tuple[Path, Path, Key]) -> None:
    _, _, key = study
    for row in {text.row for text in key.texts}:
        named = [name for text in key.texts if text.row == row for name in text.systems]
        assert sorted(named) == ["okapi", "reference", "tapir", "zebra"]
    assert ("okapi", "reference") in {text.systems[:1] + text.systems[-1:] for text in key.texts}
    assert len(key.texts) < 12 * 4


def test_a_rater_sees_the_user_but_no_formula(study: tuple[Path, Path, Key], planted: Dataset) -> None:
    out, _, _ = study
    train = set(planted.table("train", ["text"])["text"].to_pylist())
    for row in sheet(out / "rater-1.csv"):
        assert not row["text"].startswith("=")
        for line in row["earlier_reviews"].split(" | ") if row["earlier_reviews"] else []:
            assert line.split("): ", 1)[1] in train


def test_the_form_is_self_contained_and_text_stays_text(planted: Dataset, runs: list[Path], tmp_path: Path) -> None:
    hostile = make_run(tmp_path / "hostile", planted, lambda _: HOSTILE)
    out = tmp_path / "study"
    export_study([runs[0], hostile], out, rows=3, raters=1)
    page = Page((out / "rater-1.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert HOSTILE in page.text
    assert page.tags.count("input") == 3 * 2 * 3 * 9


def test_same_seed_same_study(runs: list[Path], tmp_path: Path) -> None:
    _, one = export_study(runs, tmp_path / "a", rows=5, raters=1, seed=3)
    _, two = export_study(runs, tmp_path / "b", rows=5, raters=1, seed=3)
    _, other = export_study(runs, tmp_path / "c", rows=5, raters=1, seed=4)
    assert one == two
    assert one.texts != other.texts
    assert (tmp_path / "a" / "rater-1.csv").read_bytes() == (tmp_path / "b" / "rater-1.csv").read_bytes()


def test_what_cannot_be_compared_is_refused(runs: list[Path], study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs two systems"):
        export_study(runs[:1], tmp_path / "one")
    with pytest.raises(InputError, match=r"study\.key\.json: already exists"):
        export_study(runs, study[0])
    write_json(tmp_path / "broken.json", {"format": 1})
    with pytest.raises(InputError, match=r"broken\.json: not the key of a human evaluation: dataset: field required"):
        read_key(tmp_path / "broken.json")
    write_json(tmp_path / "new.json", study[2].model_dump() | {"format": 9})
    with pytest.raises(InputError, match="format 9 is newer than 1"):
        read_key(tmp_path / "new.json")


def opinions(key: Key, quality: dict[str, float], shift: float) -> list[list[str]]:
    """A rater who likes each text by who wrote it, and is `shift` points milder than others."""
    lines = []
    for number, text in enumerate(key.texts):
        base = quality[text.systems[0]] + shift + (0.5 if number % 4 == 0 else 0)
        points = [min(5.0, max(1.0, base + step)) for step in (0.0, 0.5, -0.5)]
        lines.append([text.id, *(f"{point:g}" for point in points)])
    return lines


def test_scores_come_back_to_the_systems(study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    _, key_file, key = study
    liking = {"okapi": 4.0, "tapir": 1.5, "zebra": 3.0, "reference": 4.0}
    sheets = [
        write_sheet(tmp_path / "ann.csv", opinions(key, liking, 0.0)),
        write_sheet(tmp_path / "bob.csv", opinions(key, liking, -0.5)),
    ]
    result, out = import_study(key_file, sheets)
    assert json.loads(out.read_text())["raters"] == ["ann", "bob"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    by_name = {system.system: system for system in result.systems}
    scores = {name: system.scores for name, system in by_name.items()}
    assert (
        scores["tapir"]["personalization"].value
        < scores["zebra"][HUMAN_SCORE].value
        < scores["okapi"][HUMAN_SCORE].value
    )
    assert scores["okapi"] == scores["reference"]  # the same texts
    for system in scores.values():
        human = 0.4 * system["personalization"].value + 0.3 * (system["quality"].value + system["satisfaction"].value)
        assert system[HUMAN_SCORE].value == pytest.approx(human)
        assert system[HUMAN_SCORE].low <= system[HUMAN_SCORE].value <= system[HUMAN_SCORE].high
    gap = next(gap for gap in result.gaps if (gap.system, gap.other) == ("okapi", "tapir"))
    assert gap.gap.low > 1.5
    assert by_name["okapi"].ratings == 24
    agreement = result.agreement["personalization"]
    assert agreement is not None
    assert 0.7 < agreement < 1.0


def test_unrated_texts_are_left_out(study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    _, key_file, key = study
    first = key.texts[0]
    lines = [[first.id, "5", "4.0", "3"], *([text.id, "", "", ""] for text in key.texts[1:])]
    result, _ = import_study(key_file, [write_sheet(tmp_path / "ann.csv", lines)])
    assert {system.system for system in result.systems} == set(first.systems)
    assert result.systems[0].scores[HUMAN_SCORE].value == pytest.approx(0.4 * 5 + 0.3 * 4 + 0.3 * 3)
    assert result.rated_by_two == 0
    assert result.agreement == dict.fromkeys([*NAMES, HUMAN_SCORE])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([["t0001", "5", "5.2", "3"]], r"ann\.csv, row 1, quality: '5\.2'; expected 1 to 5 in half points"),
        ([["t0001", "5", "3,4", "3"]], r"row 1, quality: '3,4'"),
        ([["t0001", "0.5", "3", "3"]], r"row 1, personalization: '0\.5'"),
        ([["t0001", "nan", "3", "3"]], r"row 1, personalization: 'nan'"),
        ([["t0001", "5", "", "3"]], r"row 1, quality: nothing, while the row's other scores are there"),
        ([["t0001", "5", "5", "5"], ["x9", "1", "1", "1"]], r"row 2, id: 'x9' is not in the key"),
        ([["t0001", "5", "5", "5"]] * 2, r"row 2, id: t0001 occurs twice"),
        ([["t0001", "", "", ""]], r"ann\.csv: holds no rating"),
        ([["t0001", "5", "5"]], r"ann\.csv, row 1: 3 values instead of 4"),
        ([["=cmd|' /C calc'!A0", "5", "5", "5"]], r"row 1, id: .* is not in the key"),
    ],
)
def test_hostile_sheets_are_refused(
    study: tuple[Path, Path, Key], tmp_path: Path, lines: list[list[str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_sheet(write_sheet(tmp_path / "ann.csv", lines), study[2])


def test_sheets_as_spreadsheets_write_them(study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    """Semicolons and decimal commas of a European Excel, rows of bare delimiters where a line was deleted."""
    key = study[2]
    head = "id;personalization;quality;satisfaction"
    (tmp_path / "ann.csv").write_text(f"\ufeffsep=;\n{head}\nt0001;5;3,5;1\n;;;\nt0003;4;4;4\n", encoding="utf-8")
    scores_TC = read_sheet(tmp_path / "ann.csv", key)
    position = {text.id: index for index, text in enumerate(key.texts)}
    assert scores_TC[position["t0001"]].tolist() == [5, 3.5, 1]
    assert scores_TC[position["t0003"]].tolist() == [4, 4, 4]
    assert np.isnan(scores_TC).all(axis=1).sum() == len(key.texts) - 2


def test_files_that_are_no_sheets(study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    _, key_file, key = study
    path = tmp_path / "ann.csv"
    for content, message in (
        (b"id,personalization,quality\nt0001,5,5\n", "no column satisfaction"),
        (b"t0001,5,4,3\nt0002,5,4,3\n", "no column id; the sheet must keep its first line"),
        (b"\xff\xfe\x00", "no rows"),
        (b"", "the file is empty"),
        (b'id,personalization,quality,satisfaction\nt0001,"5",5,5\nt0002,"5,5,5\n', "row 2: a quote that never closes"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_sheet(path, key)
    with pytest.raises(InputError, match="expected a CSV file"):
        read_sheet(tmp_path / "ann.xlsx", key)
    with pytest.raises(InputError, match="no such file"):
        read_sheet(tmp_path / "nobody.csv", key)
    with pytest.raises(InputError, match="name the raters' CSV files"):
        import_study(key_file, [])
    with pytest.raises(InputError, match=r"weights 0\.5:0\.5:0\.5: must not be negative and sum to 1"):
        import_study(key_file, [path], weights=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="two sheets are named ann"):
        import_study(key_file, [path, tmp_path / "other" / "ann.csv"])


def test_agreement_on_the_canonical_example() -> None:
    """Krippendorff (2011), four observers and twelve units: alpha for interval data is .849."""
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
    assert krippendorff_alpha(np.array(ratings, dtype=float)) == pytest.approx(0.849, abs=5e-4)


def test_agreement_at_its_ends() -> None:
    values = np.random.default_rng(0).integers(2, 11, 200) / 2
    assert krippendorff_alpha(np.stack([values, values])) == 1.0
    other = np.random.default_rng(1).permutation(values)
    assert krippendorff_alpha(np.stack([values, other])) == pytest.approx(0.0, abs=0.15)
    assert krippendorff_alpha(np.full((2, 5), 3.0)) is None
    assert krippendorff_alpha(np.array([[1.0, NONE], [NONE, 2.0]])) is None


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_form_keeps_answers_and_saves_what_import_reads(study: tuple[Path, Path, Key], tmp_path: Path) -> None:
    out, key_file, key = study

    async def rate() -> tuple[str, list[str], int, float]:
        async with chromium() as page:
            await page.look(390)
            await page.open(f"file://{out / 'rater-1.html'}")
            # The page's own way to save, with the file caught before it goes to a download folder.
            await page.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
            for criterion, points in zip(NAMES, ("4.5", "3", "1"), strict=True):
                await page.run(f'document.querySelector(\'input[name$="{criterion}"][value="{points}"]\').click()')
            await page.run("document.getElementById('save').click()")
            saved = await page.run("window.saved.text()")
            await page.open(f"file://{out / 'rater-1.html'}?again")
            kept = await page.run("document.querySelectorAll('input:checked').length")
            wide = await page.run("document.documentElement.scrollWidth")
            return saved, page.complaints, kept, wide

    saved, complaints, kept, wide = asyncio.run(rate())
    assert complaints == []
    assert kept == 3
    assert wide <= 390
    sheet_file = tmp_path / "ann.csv"
    sheet_file.write_text(saved, encoding="utf-8")
    scores = read_sheet(sheet_file, key)
    assert np.nansum(scores, axis=0).tolist() == [4.5, 3.0, 1.0]
    first = sheet(out / "rater-1.csv")[0]["id"]
    assert not np.isnan(scores[[text.id for text in key.texts].index(first)]).any()
    assert import_study(key_file, [sheet_file])[0].raters == ["ann"]
