"""Who may import whom, read from the sources by `ast`: nothing imports upward or in a circle, few files
import fairseq, and none imports ours inside a function.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fairseq_qn"
LAYERS = [
    {"errors", "version", "config_dir", "lines", "noise", "structure", "fairseq_yaml", "kernels"},
    {"quant"},
    {"schemes"},
    {"recipe", "artifact"},
    {"modules"},
    {"api", "report"},
    {"models", "tasks", "criterions", "hub", "interop"},
    {"cli", "commands", "hydra_plugins", "plugin", "uncaught", "lazy_import"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT_FAIRSEQ = {"models", "tasks", "criterions", "hub", "__init__"}
TOP = len(LAYERS)  # the level of the package itself, which imports everything


def module_name(path: str) -> str:
    """`fairseq_qn/quant/__init__.py` -> `fairseq_qn.quant`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """The file or folder directly below the package: `fairseq_qn.quant.blocks` -> `quant`; itself
    `__init__`.
    """
    return [*module.split("."), "__init__"][1]


def resolve(node: ast.ImportFrom, path: str) -> str:
    """The absolute name of the module in `from X import y`, relative ones included."""
    if not node.level:
        return node.module or ""
    package = path.rsplit("/", 1)[0].split("/")
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(tree: ast.AST, path: str) -> list[tuple[int, str, str]]:
    """(line, module, name) of each import anywhere in a file; name is "" for `import module`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, resolve(node, path), alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                name, dots = (
                    node.args[0].value,
                    len(node.args[0].value) - len(node.args[0].value.lstrip(".")),
                )
                relative = ast.ImportFrom(module=name.lstrip(".") or None, names=[], level=dots)
                found.append((node.lineno, resolve(relative, path), ""))
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Every import in `sources` (path -> text, paths such as `fairseq_qn/quant/blocks.py`) that breaks a
    rule.
    """
    trees = {path: ast.parse(text, path) for path, text in sources.items()}
    modules = {module_name(path) for path in sources}
    modules |= {name.rsplit(".", 1)[0] for name in modules}  # folders without __init__.py
    root = f"{PACKAGE}/__init__.py"
    public = {
        name: module for _, module, name in imported(trees.get(root, ast.Module([], [])), root) if name
    }

    def target(module: str, name: str) -> str:
        """The part that an import reaches; a name taken from the package counts where the package has it
        from.
        """
        if module != PACKAGE or name.startswith("__"):
            return part_of(module)
        if f"{PACKAGE}.{name}" in modules or name in LEVEL:
            return name
        return part_of(public.get(name, PACKAGE))

    broken = []
    for path, tree in trees.items():
        here = part_of(module_name(path))
        if here != "__init__" and here not in LEVEL:
            broken.append(f"{path}: `{here}` has no layer in {Path(__file__).name}")
            continue
        for line, module, name in imported(tree, path):
            top = module.split(".")[0]
            if top in ("fairseq", "fairseq_cli") and here not in MAY_IMPORT_FAIRSEQ:
                broken.append(f"{path}:{line}: imports {module}")
            if top == PACKAGE and here != "__init__" and not (module == PACKAGE and name.startswith("__")):
                there = target(module, name)
                # only the top layer may import the package as a whole: its __init__ imports everything
                if LEVEL.get(there, TOP) > LEVEL[here] and not (
                    there == "__init__" and LEVEL[here] == TOP - 1
                ):
                    broken.append(f"{path}:{line}: {here} imports {there} ({module} {name})".rstrip())
    return broken


def circle(sources: dict[str, str]) -> list[str]:
    """The files of a circle of imports, if there is one, each of which imports the next.

    Imports inside functions and under TYPE_CHECKING count. Importing a module runs the __init__ of each
    folder around it; those around both files are running already.
    """
    files = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        around = {parent.as_posix() for parent in Path(path).parents}
        needed = graph.setdefault(path, set())
        for _, module, name in imported(ast.parse(text, path), path):
            target = f"{module}.{name}" if f"{module}.{name}" in files else module
            needed.add(files.get(target, path))
            folders = target.split(".")
            for end in range(1, len(folders)):
                folder = ".".join(folders[:end])
                if folder.replace(".", "/") not in around:
                    needed.add(files.get(folder, path))
        needed.discard(path)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def hidden(sources: dict[str, str]) -> list[str]:
    """Imports of our own inside a function: they hide a circle. The top layer starts fast by them."""
    found = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                found += [
                    f"{path}:{line}: imports {module} {name}".rstrip()
                    for line, module, name in imported(node, path)
                    if module.split(".")[0] == PACKAGE and part_of(module_name(path)) not in LAYERS[-1]
                ]
    return found


def package() -> dict[str, str]:
    """path -> text of each file of the package."""
    found = {
        p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in sorted((ROOT / PACKAGE).rglob("*.py"))
    }
    assert len(found) > 10
    return found


def test_package_keeps_the_layers() -> None:
    assert violations(package()) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle(package()) == []


def test_no_import_of_ours_inside_a_function() -> None:
    assert hidden(package()) == []


def test_the_guide_draws_these_layers() -> None:
    text = (ROOT / PACKAGE / "README.md").read_text("utf-8").partition("## Layers")[2].partition("\n## ")[0]
    drawn = [{*line.split()} for line in text.splitlines() if line.startswith("    ")]
    assert drawn[::-1] == LAYERS


ROOT_INIT = {
    "fairseq_qn/__init__.py": "from fairseq_qn.recipe import Recipe\nfrom .api import apply\nimport "
    "fairseq\n"
}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("fairseq_qn/quant/noise.py", "import fairseq"),
        ("fairseq_qn/api.py", "import fairseq.tasks as t"),
        ("fairseq_qn/interop/hf.py", "def f():\n    from fairseq.data import Dictionary"),
        ("fairseq_qn/cli.py", "from fairseq_cli.train import main"),
        ("fairseq_qn/cli.py", "import importlib\nimportlib.import_module('fairseq.models')"),
        ("fairseq_qn/quant/kmeans.py", "from fairseq_qn.modules.view import View"),
        ("fairseq_qn/quant/kmeans.py", "from ..modules.view import View"),
        ("fairseq_qn/quant/kmeans.py", "from .. import api"),
        ("fairseq_qn/quant/__init__.py", "from ..artifact import header"),
        ("fairseq_qn/errors.py", "from .recipe import Recipe"),
        ("fairseq_qn/modules/view.py", "class A:\n    def f(self):\n        import fairseq_qn.api"),
        ("fairseq_qn/artifact/codec.py", "from fairseq_qn import apply"),
        ("fairseq_qn/artifact/codec.py", "from fairseq_qn import hub"),
        ("fairseq_qn/artifact/codec.py", "from fairseq_qn import unheard_of"),
        ("fairseq_qn/artifact/codec.py", "import fairseq_qn"),
        ("fairseq_qn/artifact/codec.py", "from fairseq_qn import *"),
        ("fairseq_qn/report.py", "import importlib\nimportlib.import_module('.cli', __package__)"),
        ("fairseq_qn/hub.py", "from fairseq_qn.cli import main"),
        ("fairseq_qn/new_thing.py", ""),
    ],
)
def test_a_violation_is_seen(path: str, text: str) -> None:
    assert len(violations({**ROOT_INIT, path: text})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "fairseq_qn/tasks/masked_lm.py",
            "import fairseq\nfrom fairseq_qn import apply\nfrom ..hub import load",
        ),
        (
            "fairseq_qn/modules/view.py",
            "from fairseq_qn import Recipe, errors\nfrom ..quant.noise import mask",
        ),
        ("fairseq_qn/modules/view.py", "from fairseq_qn import __version__\nfrom .linear import PQLinear"),
        (
            "fairseq_qn/api.py",
            "from importlib.util import find_spec\nfind_spec('fairseq')\nimport fairseq_other",
        ),
        ("fairseq_qn/cli.py", "import fairseq_qn\nfrom fairseq_qn import apply, hub"),
        ("fairseq_qn/hydra_plugins/fairseq_qn/__init__.py", "import fairseq_qn"),
    ],
)
def test_what_is_allowed_passes(path: str, text: str) -> None:
    assert violations({**ROOT_INIT, path: text}) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.py": "from fairseq_qn import b", "b.py": "from fairseq_qn.a import f"}, ["a.py", "b.py"]),
        ({"a.py": "from .b import f", "b.py": "def f():\n    import fairseq_qn.a"}, ["a.py", "b.py"]),
        ({"a.py": "from . import b", "b.py": "if TYPE_CHECKING:\n    from .a import T"}, ["a.py", "b.py"]),
        (
            {"a.py": "from .b import f", "b.py": "import fairseq_qn.c", "c.py": "from .a import f"},
            ["a.py", "b.py", "c.py"],
        ),
        ({"__init__.py": "from .a import f", "a.py": "from fairseq_qn import g"}, ["__init__.py", "a.py"]),
        (  # whoever imports t.y runs t/__init__.py
            {"m/a.py": "from ..t.y import f", "t/y.py": "",
             "t/__init__.py": "from . import x", "t/x.py": "from ..m import a"},
            ["m/a.py", "t/__init__.py", "t/x.py"],
        ),
        ({"__init__.py": "from .a import f", "a.py": "from .b import f", "b.py": ""}, []),
        ({"m/__init__.py": "from . import a", "m/a.py": "from fairseq_qn.m import b", "m/b.py": ""}, []),
    ],
)  # fmt: skip
def test_a_circle_is_seen(files: dict[str, str], found: list[str]) -> None:
    named = {f"fairseq_qn/{path}": text for path, text in files.items()}
    assert sorted(set(circle(named))) == [f"fairseq_qn/{path}" for path in found]


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("fairseq_qn/models/a.py", "def f():\n    from fairseq_qn import hub", 1),
        ("fairseq_qn/models/a.py", "class A:\n    async def f(self):\n        from ..api import load", 1),
        ("fairseq_qn/models/a.py", "def f():\n    importlib.import_module('fairseq_qn.hub')", 1),
        ("fairseq_qn/models/a.py", "f = lambda: __import__('fairseq_qn')", 1),
        ("fairseq_qn/models/a.py", "from ..api import load\ndef f():\n    import tqdm, fairseq", 0),
        ("fairseq_qn/cli.py", "def f():\n    from fairseq_qn import hub", 0),
    ],
)
def test_a_hidden_import_is_seen(path: str, text: str, count: int) -> None:
    assert len(hidden({path: text})) == count
