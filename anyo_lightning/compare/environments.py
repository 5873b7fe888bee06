"""The machines and commits that the runs of a table come from."""

from collections.abc import Mapping, Sequence
from typing import Any


def describe_environments(environments: Sequence[Mapping[str, Any]]) -> str:
    """The machines and commits of several runs, for the line below their table; each machine and commit once."""
    machines, commits = set(), set()
    for environment in environments:
        found = environment["hardware"]
        gpus = ", ".join(found["gpus"]) or "no GPU"
        dtype = f", {found['dtype']}" if "dtype" in found else ""  # noted since 2026-11-26
        machines.add(
            f"{found['cpu_cores']} cores of {found['cpu']}, {found['memory_gib']} GiB, {gpus}, "
            f"{found['threads']} thread(s) a run{dtype}"
        )
        commits.add(str(environment["commit"]))
    return f"{' and '.join(sorted(machines))}, at commit {', '.join(sorted(commits))}"
