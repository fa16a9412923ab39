"""The house has floors: imports go down only, no files stand in a circle, and only a few know kinds and names.

Read from the syntax tree, so that imports inside functions count as well.
"""

import ast
import graphlib
from pathlib import Path

from medm2g_jax.modality import KINDS

PACKAGE = Path(__file__).parents[1] / "medm2g_jax"

# Top to bottom; a folder's name stands for all files in it. Those of one floor may import each other.
FLOORS = (
    ("cli", "__main__"),
    ("main",),
    ("demo", "demo_desk", "demo_near", "demo_page", "demo_view", "plan", "sweep", "export", "doctor"),
    ("run", "beside", "unpack", "fill", "prepare", "volumes", "volume_files", "embed", "retrieve", "vectors", "audit"),
    ("evaluate",),
    ("loading",),
    ("inference",),
    ("generate",),
    ("train",),
    ("recipes",),
    ("convert",),
    ("data",),
    ("config",),
    ("rounds", "limits"),
    ("model",),
    ("family",),
    ("diffusion",),
    ("align", "extract", "autoencode"),
    ("nn",),
    ("modality",),
    ("device", "cpu", "program", "keys", "arrays", "cache", "errors"),
)
FLOOR = {name: level for level, floor in enumerate(FLOORS) for name in floor}

# Where what a kind of modality picks is decided: its table, what a modality is, the stage graph, and the conversion of
# weights, which are of networks and not of modalities.
KNOW_KINDS = ("modality", "family", "rounds", "convert")
SOURCES = ("phantom", "manifest", "tfds", "mixture")


def files() -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself (its public names) is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = path.relative_to(PACKAGE).with_suffix("").parts
        if words != ("__init__",):
            found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


FILES = files()
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(tree: ast.AST) -> set[str]:
    """The files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("medm2g_jax.") for name in found if name.startswith("medm2g_jax.")}
    # "data.source.Record" is an import of data.source, "data.formats" one of itself.
    return {name if name in FILES else name.rpartition(".")[0] for name in inside} & set(FILES)


IMPORTS = {name: imports(tree) - {name} for name, tree in TREES.items()}


def floor(name: str) -> int:
    return FLOOR[name.partition(".")[0]]


def test_every_file_has_a_floor():
    assert {name.partition(".")[0] for name in FILES} <= set(FLOOR)
    assert len(FILES) > 70 and sum(map(len, IMPORTS.values())) > 200  # they were found at all
    assert "train.results" in IMPORTS["loading"] and "data.source" in IMPORTS["run"]


def test_no_import_goes_up_a_floor():
    up = [f"{name} -> {other}" for name, others in IMPORTS.items() for other in others if floor(other) < floor(name)]
    assert not up


def test_no_files_stand_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names them


def comparisons() -> list[tuple[str, int, str, list[ast.AST]]]:
    """(file, line, text, all that stands in it) of every comparison of the package."""
    return [
        (name, node.lineno, ast.unparse(node), [x for side in (node.left, *node.comparators) for x in ast.walk(side)])
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
    ]


def _word(node: ast.AST, words: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Constant) and node.value in words


def test_what_depends_on_a_kind_is_decided_in_its_table():
    """`modality.kind == "text"` and the like, as often as none; nor `match modality.kind`."""
    found = [
        (name, line, text)
        for name, line, text, parts in comparisons()
        if name.partition(".")[0] not in KNOW_KINDS
        and any(_word(x, KINDS) for x in parts)
        # Data name streams and modalities, "text" among them; what asks for a kind names it there too.
        and (not name.startswith("data.") or "kind" in text)
    ]
    assert not found
    matched = [(n, x.lineno) for n, t in TREES.items() for x in ast.walk(t) if isinstance(x, ast.Match)]
    assert not matched


def test_no_source_is_known_by_its_name():
    """What a source can do is an attribute of it: a folder may happen to be called phantom."""
    found = [
        (name, line, text)
        for name, line, text, parts in comparisons()
        if any(isinstance(x, ast.Attribute) and x.attr == "name" and "source" in ast.unparse(x.value) for x in parts)
        or (_names(parts) and any(_word(x, SOURCES) for x in parts))
    ]
    assert not found


def _names(parts: list[ast.AST]) -> bool:
    return any(isinstance(x, ast.Attribute) and x.attr == "name" for x in parts)
