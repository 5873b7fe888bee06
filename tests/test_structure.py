"""The house: imports go one way, public names are documented."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "anyo_lightning"
# From low to high: a file may import from its own layer and from lower ones.
LAYERS = [
    "defaults errors disk distributed hardware environment fetch internals losses",
    "runs lineage",
    "data",
    "checkpoint_io llm",
    "encoders views evaluation",
    "models",
    "training compare fidelity probes serving",
    "cli",
    "__init__ __main__",
]


def layer(module: str) -> int:
    """The layer of a module of ours, by the first part of its name."""
    first = module.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if first in names.split())


def imports(file: Path) -> list[str]:
    """All modules that a file imports, wherever it does so; of what comes from the package itself, its own modules."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            own = [f"anyo_lightning.{alias.name}" for alias in node.names] if node.module == "anyo_lightning" else []
            found += own or [node.module or ""]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_imports_go_downwards() -> None:
    """No module imports from a higher layer, not even within a function."""
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        name = ".".join(file.relative_to(PROJECT).with_suffix("").parts)
        for imported in imports(file):
            if imported.startswith("anyo_lightning."):
                assert layer(imported) <= layer(name), f"{name} imports {imported}"


def test_a_name_stands_for_one_module() -> None:
    """No two modules share a name, except the base of a package and its `__init__`."""
    names = Counter(file.stem for file in PACKAGE.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= {"__init__", "base"}


def test_variants_do_not_import_each_other() -> None:
    """In models/, only base and its helpers are imported by another file; losses and metrics know no Lightning."""
    helpers = ("base", "built", "checks", "contrast", "distillation", "encoding", "fitting", "identity")
    helpers += ("measuring", "parts", "restored_run", "schedule", "temperature", "transfer", "transitions")
    shared = {f"anyo_lightning.models.{name}" for name in helpers}
    for file in (PACKAGE / "models").glob("*.py"):
        for imported in imports(file):
            assert not imported.startswith("anyo_lightning.models") or imported in shared or imported.count(".") < 2
    for file in (PACKAGE / "losses.py", PACKAGE / "evaluation" / "metrics.py"):
        assert not [name for name in imports(file) if name.startswith(("lightning", "transformers"))]


def test_private_parts_of_libraries_are_in_one_place() -> None:
    """Outside of internals.py no private module is imported, and no private attribute of others is read."""
    for file in PACKAGE.rglob("*.py"):
        if file.name == "internals.py":
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        private = [node for node in nodes if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)]
        owners = {node: getattr(node.value, "id", None) in ("self", "cls") for node in private}
        own = {node.attr for node in private if owners[node]}
        foreign = {node.attr for node in private if not owners[node]} - own
        assert not foreign, f"{file} reads {foreign}"
        assert not [name for name in imports(file) if re.search(r"\._[a-z]", name)], file


def test_lower_bounds_are_those_that_are_tested() -> None:
    """pyproject.toml's bounds are what `make test-lowest` installs; torch alone is held."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    bounds = r"([\w-]+)(?:\[\w+\])?>=([\d.]+)"
    wanted = dict(re.findall(bounds, "\n".join(project["dependencies"])))
    lines = [line.split("#")[0].strip() for line in (PROJECT / "constraints-lowest.txt").read_text().splitlines()]
    tested = dict(line.split("==") for line in lines if line)
    assert len(wanted) > 10
    assert wanted.pop("torch") == "2.8"
    assert wanted == {name: tested[name] for name in wanted}
