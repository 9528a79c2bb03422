"""Embedding tables that are looked up in memory-mapped files: no parameter, nothing to train, shared by all processes
of a machine through its page cache."""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gavamoe.errors import InputError
from gavamoe.model.tables.embedding import EmbeddingTable
from gavamoe.model.tables.row_files import FOLDER, open_table, table_files


class MappedTable(EmbeddingTable):
    """Rows of N ids and the unknown one's in files below an artifact; empty until `attach` names it.

    Looking up moves the ids to the host and the rows, float32, to where the ids were.
    """

    lookups = 1

    def __init__(self, name: str, ids: int, size: int) -> None:
        """`name`: that of the files, user_embedding or item_embedding."""
        super().__init__()
        self.name, self.ids, self.embedding_dim = name, ids, size
        self.folder: Path | None = None
        self._parts: list[np.ndarray] = []
        self._starts = np.zeros(0, np.int64)

    def attach(self, folder: Path) -> None:
        """Look up in the files of an artifact from now on.

        Raises:
            InputError: they are missing, damaged, or of another table or dataset.
        """
        self._parts = open_table(folder, self.name, self.ids + 1, self.embedding_dim)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.folder = Path(folder)

    def copy_files(self, folder: Path) -> None:
        """Copy the files into another artifact, unless they are its own."""
        if self.folder is None or self.folder.resolve() == Path(folder).resolve():
            return
        (Path(folder) / FOLDER).mkdir(exist_ok=True)
        for path in table_files(self.folder, self.name):
            shutil.copyfile(path, Path(folder) / FOLDER / path.name)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, (..., E) float32.

        Raises:
            InputError: the table has not been attached to files.
        """
        if input.is_meta:
            return torch.empty(*input.shape, self.embedding_dim, device="meta")
        if not self._parts:
            raise InputError(f"{self.name}: its rows are in files, which were not opened; load the folder with gavamoe")
        wanted = input.detach().reshape(-1).cpu().numpy().clip(max=self.ids)
        # Sorted and each once: prompts ask for the same row at every position, and files are read in order.
        rows_R, place = np.unique(wanted, return_inverse=True)
        found_RE = np.empty((len(rows_R), self.embedding_dim), np.float32)
        cuts = np.searchsorted(rows_R, self._starts)
        for part, start, low, high in zip(self._parts, self._starts, cuts[:-1], cuts[1:], strict=False):
            if low < high:
                found_RE[low:high] = part[rows_R[low:high] - start]
        vectors = torch.from_numpy(found_RE).to(input.device)
        return vectors[torch.from_numpy(place).to(input.device)].view(*input.shape, self.embedding_dim)
