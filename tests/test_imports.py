"""The import contract: modules import only what is listed before them, so there are no cycles, lazy ones included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first; a module may import from its own entry and from those before it. The longest entry that a module's name begins
# with counts.
ORDER = {
    "keras_resnet": [
        "_version",
        "deprecated",
        "checks",
        "tables",
        "layers",
        "preprocessing",
        "modelcard",
        "graphs",
        "blocks",
        "zoo",
        "growth",
        "weights.formats",
        "weights.families",
        "weights",
        "models",
        "data",
        "training",
    ],
    "export": [
        "errors",
        "options",
        "results",
        "artifact",
        "family",
        "runtime",
        "console",
        "conversion",
        "metadata",
        "verification",
        "quantization",
        "exporters",
        "elastic",
        "source",
        "train",
        "serving",
        "cli",
    ],
}


def modules(package):
    """`{dotted name below the package: file}`; a package itself has the name of its folder."""
    found = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name, file, known):
    """The modules of the package that a module imports anywhere in it, also inside functions; not for type checkers alone."""
    tree = ast.parse(file.read_text())
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in unseen:
            continue
        base = [*package[: len(package) - node.level + 1], *((node.module or "").split(".") if node.module else [])]
        for alias in node.names:
            target = ".".join([*base, alias.name])
            target = target if target in known else ".".join(base)
            if target and target != name:
                yield target


def rank(package, name):
    """The position of a module in the import order of its package, or None."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((ORDER[package].index(prefix) for prefix in prefixes if prefix in ORDER[package]), None)


@pytest.mark.parametrize("package", ORDER)
def test_modules_import_downwards_only(package):
    known = modules(package)
    climbs = []
    for name, file in known.items():
        if name in ("", "__main__"):  # the package itself re-exports its public names
            continue
        own = rank(package, name)
        assert own is not None, f"{name} is not in the import order; give it a position in tests/test_imports.py"
        climbs += [f"{name} -> {target}" for target in imports(name, file, known) if rank(package, target) > own]
    assert climbs == []


@pytest.mark.parametrize("package", ORDER)
def test_there_are_no_cycles(package):
    known = modules(package)
    edges = {name: set(imports(name, file, known)) for name, file in known.items() if name}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in edges:
            return
        path.append(name)
        for target in edges[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in edges:
        visit(name)


@pytest.mark.parametrize(
    ("package", "foreign"), [("keras_resnet", {"keras_resnet", "resnet_export"}), ("export", {"resnet_export"})]
)
def test_packages_import_their_own_modules_relatively(package, foreign):
    """Otherwise the order above would not see such an import; and `keras_resnet` never depends on the exporter."""
    found = []
    for name, file in modules(package).items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [f"{name} -> {target}" for target in names if target.split(".")[0] in foreign]
    assert found == []
