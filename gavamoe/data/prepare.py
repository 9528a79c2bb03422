"""`gavamoe data prepare`: a source of reviews or pairs becomes a dataset folder, in bounded memory.

Two passes: `validation` reads the source once, keeps the good rows and counts words; then splits are drawn, and the
texts are read back to choose sentences and features and to write the dataset.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from gavamoe.artifacts.files import write_folder
from gavamoe.data.bounds import MAX_TITLE_CHARS
from gavamoe.data.judging import OrderedMap, run_here
from gavamoe.data.ratings import RatingScale
from gavamoe.data.readers.batches import FIELDS, AnyBatch
from gavamoe.data.readers.formats import Format, TextMode, check_columns, get_format, read_titles
from gavamoe.data.readers.several import read_several
from gavamoe.data.readers.sources import NO_COLUMN, Quoting, SourceOptions, check_encoding
from gavamoe.data.splits import check_ratio, draw_splits, given_splits, repeated_pairs
from gavamoe.data.summary import PrepareSummary, Quartiles
from gavamoe.data.text.cleaning import clean
from gavamoe.data.text.features import SentenceRule
from gavamoe.data.texts import OnRows, choose_texts, stored, write_texts
from gavamoe.data.user_ids import UserIds, read_hash_key, read_ids
from gavamoe.data.validation import AcceptedRows, RowValidator
from gavamoe.data.writer import LEFT_OUT, DatasetWriter, Rows
from gavamoe.data.writer import rating_scale as scale_of
from gavamoe.errors import InputError

DEFAULT_MAX_REJECTED_SHARE = 0.1
_NAMED = 3
"""Sources that a dataset names; of more it has the number."""


def prepare(
    source: Path | Sequence[Path],
    out: Path,
    format: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: Sequence[float] = (8, 1, 1),
    index_dir: Path | None = None,
    seed: int = 0,
    max_rejected_share: float = DEFAULT_MAX_REJECTED_SHARE,
    titles: Path | None = None,
    text_mode: TextMode | None = None,
    sentence: SentenceRule | None = None,
    rating_scale: tuple[float, float] | None = None,
    encoding: str | None = None,
    quoting: Quoting = "auto",
    escape: str | None = None,
    drop_users: Path | None = None,
    hash_users: Path | None = None,
    pairs: Path | None = None,
    pairs_columns: Mapping[str, str] | None = None,
    keep_textless: bool = False,
    keep_repeated_texts: bool = False,
    progress: OnRows | None = None,
    run: OrderedMap = run_here,
) -> PrepareSummary:
    """Write the dataset folder `out` from `source`; whole or not at all.

    Args:
        source: one source, or several of the same format, whose rows are numbered through in this order.
        format: a name in `readers.formats.FORMATS`.
        columns: for format table: the source's column of each field whose column has another name; "-": leave it out.
        split: ratio of train, valid and test rows.
        index_dir: folder of index files that give the split instead; repeated pairs are then kept.
        max_rejected_share: fail when a larger share of rows is rejected, or of times is not understood.
        titles: file of item titles (Amazon's meta file, Yelp's business file).
        text_mode: explanation, review or none; None: the format's own.
        sentence: which sentence of a review is its explanation: best (None: this) or frequent; text mode review only.
        rating_scale: lowest and highest rating; None: the format's own.
        encoding, quoting, escape: of a text source, see `readers.sources.SourceOptions`.
        drop_users: file with an id a line: these users' rows are left out, and nothing of them is kept.
        hash_users: file with a secret: ids of users become their keyed hashes (`user_ids.hash_id`).
        pairs: a table of more pairs, without text, on which stage 1 alone trains.
        pairs_columns: its columns of user, item, rating and time whose names are others, as `columns`.
        keep_textless: rows of the source without a text are kept as such pairs, rather than rejected.
        keep_repeated_texts: explanations that the same user wrote before stay (`text.repeats`); text mode review only,
            where they otherwise become such pairs.
        run: judges rows and chooses sentences, batch by batch; with `runtime.ordered_tasks` side by side. The dataset
            is the same.

    Raises:
        InputError: something about the source, the arguments or `out` is wrong.
    """
    sources = [Path(source)] if isinstance(source, str | Path) else [Path(each) for each in source]
    kind, shown = get_format(format), _shown(sources)
    check_columns(format, columns or {})
    check_ratio(split)
    options = _source_options(format, columns or {}, encoding, quoting, escape)
    _check_arguments(sources, format, kind, text_mode, rating_scale, max_rejected_share, titles)
    _check_pairs(pairs, pairs_columns or {}, index_dir)
    mode, scale = text_mode or kind.text_mode, rating_scale or kind.scale
    rule = _sentence_rule(sentence, mode)
    if keep_repeated_texts and mode != "review":
        raise InputError(f"keep_repeated_texts: text mode {mode} takes none out; leave --keep-repeated-texts out")
    report = progress or (lambda phase, rows: None)
    ids = UserIds(read_ids(drop_users) if drop_users else (), read_hash_key(hash_users) if hash_users else None)
    with write_folder(Path(out)) as folder:
        with RowValidator(folder, mode, scale, kind.rated, ids, keep_textless) as validator:
            for read in validator.add(read_several(kind.read, sources, options), run):
                report("read", read)
            if pairs is not None:
                more = _read_pairs(Path(pairs), options, pairs_columns or {}, validator.rated)
                try:
                    for read in validator.add(more, run, pairs=True):
                        report("read", read)
                except InputError as error:
                    raise InputError(str(error).replace("--column ", "--pairs-column ")) from error
        accepted = validator.accepted()
        _check_rejections(shown, validator, len(accepted.row), max_rejected_share)
        _check_times(shown, format, validator, max_rejected_share)
        _read_title_file(sources[0], kind, titles, validator)
        rows, repeats = _split(validator, accepted, index_dir, split, seed)
        names = [each.name for each in sources] + ([] if pairs is None else [Path(pairs).name])
        name = " + ".join(names if len(names) <= _NAMED else [*names[:_NAMED], f"{len(names) - _NAMED} more"])
        settings = {"source": name, "format": format, "text_mode": mode, "sentence": rule, "seed": seed}
        settings["split"] = Path(index_dir).name if index_dir is not None else ":".join(f"{share:g}" for share in split)
        dropping = mode == "review" and not keep_repeated_texts
        return _write(folder, validator, rows, accepted.has_text, repeats, settings, scale, dropping, report, run)


def _shown(sources: Sequence[Path]) -> str:
    """The sources, for messages."""
    if not sources:
        raise InputError("prepare: names no source")
    return f"{sources[0]}" + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")


def _check_arguments(
    sources: Sequence[Path],
    format: str,
    kind: Format,
    text_mode: str | None,
    rating_scale: tuple[float, float] | None,
    max_rejected_share: float,
    titles: Path | None,
) -> None:
    for number, source in enumerate(sources):
        if not source.exists():
            raise InputError(f"{source}: no such file")
        if source in sources[:number]:
            raise InputError(f"{source}: named twice; its rows would count twice")
    if len(sources) > 1 and format == "peter":
        raise InputError("format peter: is one folder; give the others a dataset of their own")
    if text_mode is not None and text_mode not in get_args(TextMode):
        raise InputError(f"text_mode: unknown value {text_mode!r}; known are {', '.join(get_args(TextMode))}")
    if not 0 <= max_rejected_share <= 1:
        raise InputError(f"max_rejected_share: {max_rejected_share} is outside 0..1")
    if rating_scale is not None and not -1e30 < rating_scale[0] < rating_scale[1] < 1e30:
        raise InputError(f"rating_scale: {rating_scale[0]}..{rating_scale[1]} is not a valid range (low to high)")
    if titles is not None and kind.title_keys is None:
        raise InputError(f"titles: format {format} has no title file; a table has a title column (--column title=NAME)")


def _sentence_rule(sentence: SentenceRule | None, text_mode: TextMode) -> SentenceRule | None:
    """The rule by which sentences are chosen; None where none are."""
    if sentence is not None and sentence not in get_args(SentenceRule):
        raise InputError(f"sentence: unknown value {sentence!r}; known are {', '.join(get_args(SentenceRule))}")
    if text_mode == "review":
        return sentence or "best"
    if sentence is not None:
        raise InputError(
            f"sentence: text mode {text_mode} chooses no sentences; leave --sentence out, or take --text-mode review"
        )
    return None


_PAIR_FIELDS = ("user", "item", "rating", "time")


def _check_pairs(pairs: Path | None, columns: Mapping[str, str], index_dir: Path | None) -> None:
    if unknown := sorted(set(columns) - set(_PAIR_FIELDS)):
        raise InputError(f"pairs_columns: a pair has no {unknown[0]}; its fields are {', '.join(_PAIR_FIELDS)}")
    if pairs is None:
        if columns:
            raise InputError("pairs_columns: there is no file of pairs; name one with --pairs")
        return
    if not Path(pairs).exists():
        raise InputError(f"{pairs}: no such file")
    if index_dir is not None:
        raise InputError("pairs: index files give the splits of one source; leave out --pairs or --index-dir")


def _read_pairs(pairs: Path, options: SourceOptions, columns: Mapping[str, str], rated: bool) -> Iterator[AnyBatch]:
    """The file of pairs, without what only rows with a text have, and without ratings where these have none."""
    left_out = [field for field in FIELDS if field not in _PAIR_FIELDS or (field == "rating" and not rated)]
    return get_format("table").read(pairs, replace(options, columns=dict(columns) | dict.fromkeys(left_out, NO_COLUMN)))


def _source_options(
    format: str, columns: Mapping[str, str], encoding: str | None, quoting: Quoting, escape: str | None
) -> SourceOptions:
    if quoting not in get_args(Quoting):
        raise InputError(f"quoting: unknown value {quoting!r}; known are {', '.join(get_args(Quoting))}")
    if format != "table" and (quoting != "auto" or escape is not None):
        raise InputError(f"quoting, escape: only format table has delimited files; format {format} has none")
    if format == "peter" and encoding is not None:
        raise InputError("encoding: format peter is a pickle, which has none")
    return SourceOptions(dict(columns), encoding and check_encoding(encoding), quoting, escape)


def _check_times(source: str, format: str, validator: RowValidator, max_share: float) -> None:
    """Raise InputError when too many times are not understood: they decide which row of a repeated pair stays."""
    share = validator.unknown_times / max(validator.times, 1)
    if share <= max_share or validator.first_unknown_time is None:
        return
    row, time = validator.first_unknown_time
    without = f", or leave the column out with --column time={NO_COLUMN}" if format == "table" else ""
    raise InputError(
        f"{source}: {validator.unknown_times} of {validator.times} times are not understood ({share:.1%}, at most"
        f" {max_share:.0%} are allowed); first: row {row}: {time!r}; write seconds since 1970 or ISO 8601, such as"
        f" 2020-01-31T09:30:00{without}"
    )


def _check_rejections(source: str, validator: RowValidator, kept: int, max_share: float) -> None:
    """Raise InputError when too many rows were rejected, or none is left."""
    if validator.read == 0:
        raise InputError(f"{source}: holds no rows")
    rejected = validator.rejected.total()
    share = rejected / validator.read
    if share <= max_share and kept:
        return
    first = validator.first_rejection
    reasons = ", ".join(f"{reason} {count}" for reason, count in validator.rejected.most_common())
    shown = f"; first: row {first.row}, {first.reason}: {first.raw}" if first else ""
    if validator.rejected.most_common(1)[0][0] == "not valid UTF-8":
        shown += "; name the file's encoding with --encoding, such as latin-1 or cp1252"
    way_out = "" if not kept else f"; fix the rows or allow more with --max-rejected-share {min(1.0, share + 0.01):.2f}"
    raise InputError(
        f"{source}: {rejected} of {validator.read} rows rejected ({share:.1%}, at most {max_share:.0%} are allowed): "
        f"{reasons}{shown}{way_out}"
    )


def _read_title_file(source: Path, kind: Format, titles: Path | None, validator: RowValidator) -> None:
    path = titles
    if path is None and kind.title_file is not None and (source.parent / kind.title_file).is_file():
        path = source.parent / kind.title_file
    if path is None or kind.title_keys is None:
        return
    by_code = read_titles(Path(path), kind.title_keys, validator.items.codes)
    cleaned = clean(pa.array(by_code.values(), pa.string()), MAX_TITLE_CHARS).to_pylist()
    validator.titles.update({code: title for code, title in zip(by_code, cleaned, strict=True) if title})


def _split(
    validator: RowValidator, accepted: AcceptedRows, index_dir: Path | None, ratio: Sequence[float], seed: int
) -> tuple[Rows, int]:
    """The rows with their splits, and how many are left out as repeated pairs."""
    if index_dir is not None:
        split, repeats = given_splits(index_dir, accepted.row, validator.last_row), 0
    else:
        single = ~repeated_pairs(accepted.user, accepted.item, accepted.time, accepted.has_text)
        split, repeats = np.full(len(single), LEFT_OUT, dtype=np.int8), int(np.count_nonzero(~single))
        # Rows with a text are split as they are without the others.
        for rows, seeds in ((single & accepted.has_text, seed), (single & ~accepted.has_text, [seed, 1])):
            split[rows] = draw_splits(int(np.count_nonzero(rows)), ratio, seeds)
    rows = Rows(
        users=validator.users.values,
        items=validator.items.values,
        titles=[validator.titles.get(code) for code in range(len(validator.items))],
        user=accepted.user,
        item=accepted.item,
        rating=accepted.rating,
        split=split,
    )
    return rows, repeats


def _write(
    folder: Path,
    validator: RowValidator,
    rows: Rows,
    has_text: np.ndarray,
    repeats: int,
    settings: dict[str, Any],
    scale: tuple[float, float] | None,
    dropping: bool,
    report: OnRows,
    run: OrderedMap,
) -> PrepareSummary:
    vocabulary = validator.vocabulary()
    kept = rows.split != LEFT_OUT
    with DatasetWriter(folder, rows) as writer:
        leaning = _leaning(rows.rating, kept, scale) if settings["sentence"] == "best" else None
        texts = partial(choose_texts, validator, vocabulary, settings["sentence"], leaning, dropping, run)
        with stored(folder / "chosen.arrow", texts) if dropping else nullcontext(texts) as read:
            written = write_texts(read, writer, kept & has_text, rows.user if dropping else None, report)
        validator.remove_spool()
        counts = {
            "read": validator.read,
            "kept": int(kept.sum()),
            "repeated_pairs": repeats,
            "dropped": validator.user_ids.rows_dropped,
            "in_no_index": int((~kept).sum()) - repeats,
            "unknown_times": validator.unknown_times,
            "texts_cut": validator.texts_cut,
            "without_text": int((kept & ~has_text).sum()),
            "repeated_texts": written.repeated,
            "without_feature": written.without_feature,
            "vocabulary": len(vocabulary.features) if vocabulary else 0,
        }
        rejected = {f"rejected: {reason}": count for reason, count in sorted(validator.rejected.items())}
        meta = writer.finish(**settings, preparation=counts | rejected, bounds=scale)
    return PrepareSummary(
        **counts,
        rejected=dict(validator.rejected.most_common()),
        rows=meta.rows,
        users=meta.users,
        items=meta.items,
        titles=sum(rows.titles[code] is not None for code in np.unique(rows.item[kept]).tolist()),
        fingerprint=meta.fingerprint,
        sentence=settings["sentence"],
        words=Quartiles.of_counts(written.words) if settings["text_mode"] != "none" else None,
        notes=validator.notes + _remarks(validator),
    )


def _remarks(validator: RowValidator) -> list[str]:
    """What the values of the source look like that its user may not have meant."""
    remarks = []
    if validator.unknown_times and validator.first_unknown_time:
        row, time = validator.first_unknown_time
        remarks.append(f"{validator.unknown_times:,} times are not understood, such as {time!r} (row {row})")
    if validator.user_ids.not_found:
        remarks.append(f"{validator.user_ids.not_found:,} of the users to leave out have no row")
    if validator.pointed_ids:
        remarks.append(f"{validator.pointed_ids:,} ids end in .0, as whole numbers do that were saved as fractions")
    return remarks


def _leaning(rating: np.ndarray, kept: np.ndarray, bounds: tuple[float, float] | None) -> np.ndarray | None:
    """The sentiment of each row's rating, -1, 0 or 1: int8 (N,); None without ratings."""
    rated = rating[kept & ~np.isnan(rating)]
    values, extent = scale_of(np.unique(rated), bounds)
    return None if extent is None else RatingScale(low=extent[0], high=extent[1], values=values).leaning(rating)
