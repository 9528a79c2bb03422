"""Losses of an evaluation's rows, kept row by row so that systems are compared on the same rows: losses.parquet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.errors import InputError, one_line

LOSSES_FILE = "losses.parquet"
CONDITIONS = {
    "shown": "user's slot, item's slot, rating and features given",
    "hidden": "the user's slot is the unknown user's; the gate is still the user's own",
    "stranger": "the user's slot is the unknown user's; the gate follows from 3 training texts of the user",
}
"""What a model is told of the user."""
ALL = "all"
GROUPS: Mapping[str, tuple[int, int | None]] = {"0": (0, 0), "1-4": (1, 4), "5-19": (5, 19), "20+": (20, None)}
"""Groups of users by their training rows with a text: fewest and most."""
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("user", pa.string()),
        ("training_rows", pa.int64()),
        ("tokens", pa.int64()),
        *((f"loss_{condition}", pa.float64()) for condition in CONDITIONS),
        ("cluster", pa.int16()),
    ]
)


@dataclass(frozen=True)
class RowLosses:
    """The texts of N rows as one model reads them."""

    row_N: np.ndarray
    """Positions in the split, ascending: int64."""
    user_N: np.ndarray
    """Raw ids of the users: str."""
    training_rows_N: np.ndarray
    """Training rows with a text of the user: int64."""
    tokens_N: np.ndarray
    """Tokens of the text, its end included: int64."""
    loss_N: dict[str, np.ndarray]
    """By condition, the text's negative log-likelihood in nats, summed over its tokens; NaN where not measured."""
    cluster_N: np.ndarray
    """Cluster of the pair, as its user is known: int16."""

    def write(self, folder: Path) -> None:
        """Write the file into an evaluation's folder."""
        losses = [pa.array(self.loss_N[condition], pa.float64(), from_pandas=True) for condition in CONDITIONS]
        before = [self.row_N, self.user_N.tolist(), self.training_rows_N, self.tokens_N]
        columns = [*map(pa.array, before), *losses, pa.array(self.cluster_N)]
        pq.write_table(pa.table(columns, names=_SCHEMA.names).cast(_SCHEMA), folder / LOSSES_FILE, compression="zstd")

    @classmethod
    def read(cls, folder: Path) -> "RowLosses | None":
        """Read an evaluation's; None for one without.

        Raises:
            InputError: the file is damaged, or not one of these.
        """
        path = Path(folder) / LOSSES_FILE
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: can't be read ({one_line(error)}); evaluate the run again") from error
        if table.schema.remove_metadata() != _SCHEMA:
            raise InputError(
                f"{path}: columns {', '.join(table.column_names)[:80]}, not those of losses; evaluate again"
            )
        return cls(
            row_N=table["row"].to_numpy(),
            user_N=np.array(table["user"].to_pylist(), dtype=np.str_),
            training_rows_N=table["training_rows"].to_numpy(),
            tokens_N=table["tokens"].to_numpy(),
            loss_N={condition: table[f"loss_{condition}"].to_numpy() for condition in CONDITIONS},
            cluster_N=table["cluster"].to_numpy(),
        )

    def summary(self) -> dict[str, dict[str, Any]]:
        """Section "losses" of metrics.json: nats per token, by condition and group; what has no rows is left out."""
        found: dict[str, dict[str, Any]] = {}
        for condition, loss_N in self.loss_N.items():
            for group, inside_N in groups_of(self.training_rows_N).items():
                rows = np.flatnonzero(inside_N & ~np.isnan(loss_N))
                if len(rows):
                    tokens = int(self.tokens_N[rows].sum())
                    found.setdefault(condition, {})[group] = {
                        "users": len(np.unique(self.user_N[rows])),
                        "rows": len(rows),
                        "tokens": tokens,
                        "loss": float(loss_N[rows].sum() / tokens),
                    }
        return found


def groups_of(training_rows_N: np.ndarray) -> dict[str, np.ndarray]:
    """bool (N,) by group: the rows of its users; last, all."""
    groups = {
        name: (training_rows_N >= least) & (training_rows_N <= (np.inf if most is None else most))
        for name, (least, most) in GROUPS.items()
    }
    return groups | {ALL: np.ones(len(training_rows_N), dtype=bool)}
