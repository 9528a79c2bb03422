"""Tables about datasets: `gavamoe data prepare` and `data describe`."""

from pathlib import Path

from gavamoe.cli.terminal import console, print_json, print_table
from gavamoe.data.describe import Description
from gavamoe.data.summary import PrepareSummary


def print_prepared(result: PrepareSummary, out: Path, *, as_json: bool) -> None:
    """Rows read, kept and rejected, by reason."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    rows = [
        ("read", result.read),
        *[(f"rejected: {reason}", count) for reason, count in result.rejected.items()],
        ("left out: a later row has the same user and item", result.repeated_pairs),
        ("left out: users named by --drop-users", result.dropped),
        ("left out: in no index file", result.in_no_index),
        ("kept", result.kept),
        *[(f"  {split}", count) for split, count in result.rows.items()],
        ("kept without a text, for stage 1 alone", result.without_text),
        ("kept, but not the text: the user wrote it before", result.repeated_texts),
        ("kept texts without a feature", result.without_feature),
        ("times not understood", result.unknown_times),
        ("texts cut to the longest allowed", result.texts_cut),
    ]
    print_table(f"Dataset {out}", ["", "rows"], [row for row in rows if row[1] or row[0] in ("read", "kept")])
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if result.words is not None:
        chosen = f", chosen by the rule {result.sentence}" if result.sentence else ""
        console.print(
            f"explanations: {result.words.median} words (median; the middle half {result.words.low} to "
            f"{result.words.high}){chosen}",
            markup=False,
            soft_wrap=True,
        )
    rejected = f"; rejected rows are in {out / 'rejected.jsonl'}" if result.rejected else ""
    console.print(
        f"{result.users:,} users, {result.items:,} items ({result.titles:,} with a title){rejected}",
        markup=False,
        soft_wrap=True,
    )


def print_description(description: Description, *, as_json: bool) -> None:
    """Table 1 of the paper for one dataset, and more."""
    if as_json:
        print_json(description.model_dump(mode="json"))
    print_table("Dataset", ["", ""], description.rows())
