"""What `gavamoe ablate` and `gavamoe human-eval` print: tables for people, one JSON document for machines."""

from pathlib import Path

from gavamoe.cli.terminal import console, print_json, print_table
from gavamoe.evaluation.comparison import SHORT, Comparison, blocks, difference_table, systems_of, table
from gavamoe.evaluation.comparison_files import FIGURE_FILE, FOREST_FILE, SCORES_FILE, TABLE_FILE
from gavamoe.evaluation.human.results import Estimate, HumanResult
from gavamoe.evaluation.human.study import CRITERIA, Key
from gavamoe.evaluation.losses.differences import LossComparison
from gavamoe.evaluation.losses.display import loss_tables
from gavamoe.evaluation.losses.row_losses import CONDITIONS


def print_comparison(comparison: Comparison, folder: Path, *, as_json: bool) -> None:
    """`gavamoe ablate`: whether gates pay, Figure 3's table, the differences to the full system, what is left."""
    if as_json:
        print_json(comparison.model_dump(mode="json"))
    for sentence in comparison.losses.verdict if comparison.losses else ():
        console.print(sentence, markup=False, soft_wrap=True)
    if comparison.outcomes:
        for told, block in (found := blocks(comparison)):
            part = f"{told}: " if len(found) > 1 else ""
            title = f"{part}{comparison.dataset}, mean ± half the 95 % t interval over the seeds"
            print_table(title, *table(block, SHORT))
            if len(systems_of(block)) > 1:
                title = f"{part}differences under the same seed; * where the interval leaves out 0"
                print_table(title, *difference_table(block, SHORT))
        if comparison.losses is not None:
            _print_losses(comparison.losses, folder)
        console.print(
            f"all scores: {folder / TABLE_FILE}   figure: {folder / FIGURE_FILE}   data: {folder / SCORES_FILE}",
            markup=False,
            soft_wrap=True,
        )
        console.print(f"next:   gavamoe report {folder}", markup=False, soft_wrap=True)
    for name, why in comparison.skipped.items():
        console.print(f"left out: {name} ({why})", markup=False, soft_wrap=True)
    if comparison.left:
        console.print(
            f"not started yet, call again to go on: {'; '.join(comparison.left)}", markup=False, soft_wrap=True
        )


def _print_losses(losses: LossComparison, folder: Path) -> None:
    """By how much the controls' loss of the same rows is higher, by the users' training rows."""
    for condition, (heads, rows) in loss_tables(losses, brief=True).items():
        title = f"Loss over {losses.label}'s, {condition}: {CONDITIONS[condition]}"
        print_table(title, heads, rows)
    console.print(
        f"* where the 95 % interval over users leaves out 0; above 0, {losses.label} is better; drawn in"
        f" {folder / FOREST_FILE}",
        markup=False,
        soft_wrap=True,
    )


def print_study(out: Path, key_file: Path, key: Key, raters: int) -> None:
    """`gavamoe human-eval export`."""
    rows = len({text.row for text in key.texts})
    print_table(
        f"Human evaluation of {', '.join(key.systems)}",
        ["", ""],
        [("rows", rows), ("texts to rate (equal ones once)", len(key.texts)), ("raters", raters)],
    )
    console.print(f"for raters: {out}   keep to yourself: {key_file}", markup=False, soft_wrap=True)
    console.print(f"next: gavamoe human-eval import {key_file} RATER-1.csv ...", markup=False, soft_wrap=True)


def print_human(result: HumanResult, out: Path, *, as_json: bool) -> None:
    """`gavamoe human-eval import`: the paper's Table 4, with intervals and agreement."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    names = list(result.agreement)
    heads = ["system", "rows", *(criterion.letter for criterion in CRITERIA), "Human-Score"]
    rows = [
        (system.system, system.rows, *(_interval(system.scores[name]) for name in names)) for system in result.systems
    ]
    title = f"{len(result.raters)} raters, 1 to 5; 95 % bootstrap over rows"
    print_table(title, heads, [*rows, ("agreement (alpha)", "", *result.agreement.values())])
    gaps = [(f"{gap.system} less {gap.other}", gap.rows, _interval(gap.gap)) for gap in result.gaps]
    print_table("Human-Score on the same rows", ["", "rows", "difference"], gaps)
    console.print(f"result: {out}   plot: {out.with_suffix('.png')}", markup=False, soft_wrap=True)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
