"""Write the README's results block from tested runs.

    python benchmarks/results.py runs/table/*/

Puts the comparison table, the command that makes the runs, hardware, commit and date into benchmarks/results.md and
between the README's markers; a test checks that the two agree.
"""

import argparse
import datetime
import tempfile
from pathlib import Path

from anyo_lightning.compare.environments import describe_environments
from anyo_lightning.compare.table import compare
from anyo_lightning.runs import find_runs

PROJECT = Path(__file__).parents[1]
START, END = "<!-- results: made by `make table`, do not edit -->\n", "<!-- end of results -->"


def main() -> None:
    """Write the block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--command", default="make table", help="what made the runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / "table.md"
        compare(options.runs, baseline="markov", format="markdown", output=table)
        text = table.read_text()
    environments = [
        run.read_metrics()["environment"]["training"] for folder in options.runs for run in find_runs(folder)[0]
    ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    note = f"Made by `{options.command}` on {describe_environments(environments)}, {today}."
    block = f"{text.strip()}\n\n{note}\n"
    (PROJECT / "benchmarks" / "results.md").write_text(block)
    readme = PROJECT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
