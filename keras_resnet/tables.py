"""Tables for reports that are printed."""

import io
from collections.abc import Iterable, Sequence


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a table as plain text: the first column aligned left, the others right.

    Args:
        columns: Titles of the columns.
        rows: Cells of each row; they are converted by `str`.

    Returns:
        The lines of the table, its title first, without colours.
    """
    # Rich is imported here, since only those who print a report need it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for index, title in enumerate(columns):
        table.add_column(Text(title), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
