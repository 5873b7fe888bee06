"""Write a page of results from tested runs, and the block of that name in the READMEs.

    python benchmarks/results.py runs/table/*/ --output benchmarks/ml100k.md --baseline markov --command "make table"

Puts the comparison table, the command that makes the runs, hardware, commit and date between the page's markers, and
with `--readme` between the markers of that name in README.md and README.ja.md, too; a test checks that they agree. What
stands around them stays.
"""

import argparse
import datetime
import tempfile
from pathlib import Path

from anyo_lightning.compare.environments import describe_environments
from anyo_lightning.compare.find_runs import find_runs
from anyo_lightning.compare.table import compare

PROJECT = Path(__file__).parents[1]
READMES = (PROJECT / "README.md", PROJECT / "README.ja.md")
END = "<!-- end of results -->"


def main() -> None:
    """Write the block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="page with markers")
    parser.add_argument("--command", required=True, help="what made the runs")
    parser.add_argument("--baseline", default="markov", help="the row that others are compared with")
    parser.add_argument("--block", help="name of the block, where it is not the page's")
    parser.add_argument("--metrics", nargs="*", help="figures to show, as anyo compare takes them")
    parser.add_argument("--slices", action="store_true", help="whether a table of slices follows")
    parser.add_argument("--foreign", nargs="*", help="NAME=FILE of other systems' lists, as anyo compare takes them")
    parser.add_argument("--readme", action="store_true", help="whether the block is the READMEs', too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / "table.md"
        shown = {"metrics": options.metrics, "slices": options.slices, "foreign": options.foreign}
        compare(options.runs, baseline=options.baseline, format="markdown", output=table, **shown)
        text = table.read_text()
    environments = [
        run.read_metrics()["environment"]["training"] for folder in options.runs for run in find_runs(folder)[0]
    ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    note = f"Made by `{options.command}` on {describe_environments(environments)}, {today}."
    block = f"{text.strip()}\n\n{note}\n"
    start = f"<!-- results of {options.block or options.output.stem}: made by a command, do not edit -->\n"
    for page in [options.output, *(READMES if options.readme else [])]:
        before, rest = page.read_text().split(start)
        after = rest[rest.index(END) :]
        page.write_text(f"{before}{start}\n{block}\n{after}")


if __name__ == "__main__":
    main()
