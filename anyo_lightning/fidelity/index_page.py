"""Index fidelity as one page: recall against queries per second, and the table."""

import dataclasses

from anyo_lightning.compare.page import fill_page
from anyo_lightning.fidelity.index_table import FidelityTable, fidelity_columns

SCRIPTS = ("compare/report_shared.js", "fidelity/fidelity.js")


def as_page(table: FidelityTable) -> str:
    """The page as one text."""
    columns = fidelity_columns(table)
    content = {
        "about": table.about,
        "notes": table.notes,
        "k": table.k,
        "columns": [{"header": column.header.strip(), "texts": column.texts} for column in columns],
        "indexes": [
            dataclasses.asdict(index) | dict(zip(("kind", "parameters"), _parts(index.factory), strict=True))
            for index in table.indexes
        ],
    }
    return fill_page("anyo index", "fidelity/fidelity.html", SCRIPTS, content)


def _parts(factory: str) -> tuple[str, str]:
    """What was built, and how it was searched: lines of the plot join the same thing built."""
    kind, _, parameters = factory.partition(":")
    return kind, parameters
