"""Search in users and items by id or title, as the page offers it."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from gavamoe.data.catalog import ITEMS_SCHEMA, USERS_SCHEMA, Catalog, read_table
from gavamoe.serving.schema import CatalogEntry, CatalogResponse


class Browser:
    """Search in a catalog's users and items; they stay in one Arrow table each."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self._known = {"users": catalog.known_users, "items": catalog.known_items}
        self._tables = {
            "users": read_table(folder / "users.parquet", USERS_SCHEMA),
            "items": read_table(folder / "items.parquet", ITEMS_SCHEMA),
        }

    def search(self, kind: str, query: str, limit: int) -> CatalogResponse:
        """Entries of "users" or "items" whose id or title contains `query`; those with most training rows first."""
        table = self._tables[kind]
        if query:
            matches = pc.match_substring(table["id"], query, ignore_case=True)
            if kind == "items":
                titles = pc.fill_null(pc.match_substring(table["title"], query, ignore_case=True), False)
                matches = pc.or_(matches, titles)
            table = table.filter(matches)
        first = table.take(pc.select_k_unstable(table, limit, [("count", "descending"), ("index", "ascending")]))
        return CatalogResponse(results=[self._entry(kind, row) for row in first.to_pylist()], total=table.num_rows)

    def _entry(self, kind: str, row: dict[str, Any]) -> CatalogEntry:
        return CatalogEntry(
            id=row["id"],
            title=row.get("title"),
            known=row["index"] < self._known[kind],
            count=row["count"],
            # A user's are words of the user's own reviews.
            features=list(row["features"] or ()) if kind == "items" else [],
        )
