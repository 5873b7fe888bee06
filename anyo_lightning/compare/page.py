"""A page that stands alone: HTML, style, scripts and plotly.js in one file that needs no network.

The page is page.html with a body of ours, report.css, scripts, plotly.js (from the `plotly` package: SVG that prints
well, tooltips, a legend that hides lines) and one block of JSON. Everything a user or a catalogue may have named
reaches the page through that JSON and `textContent`, never as HTML.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs


def fill_page(name: str, body: str, scripts: Sequence[str], content: dict[str, Any]) -> str:
    """The page as one text.

    Args:
        name: Title until the scripts set one.
        body: File in the package with the page's body.
        scripts: Files in the package, in the order in which they run.
        content: What the scripts find as `data`.
    """
    folder = files("anyo_lightning")
    page = folder.joinpath("compare/page.html").read_text(encoding="utf-8")
    parts = {
        "/* title */": name,
        "/* body */\n": folder.joinpath(body).read_text(encoding="utf-8"),
        "/* style */": folder.joinpath("compare/report.css").read_text(encoding="utf-8"),
        "/* data */": _inside_script(content),
        "/* scripts */": "\n".join(folder.joinpath(script).read_text(encoding="utf-8") for script in scripts),
        "/* plotly */": get_plotlyjs(),
    }
    for place, text in parts.items():
        before, after = page.split(place)
        page = before + text + after
    return page


def _inside_script(content: dict[str, Any]) -> str:
    """JSON that no text in it can end: `</script>` and `<!--` need a `<`, which JSON may write as an escape."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")
