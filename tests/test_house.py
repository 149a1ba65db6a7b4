"""The tree as drawn: what lies at the top, what no tracked file may name, what the mathematics says of
itself.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from fairseq_qn.version import __version__

ROOT = Path(__file__).resolve().parents[1]
TOP = {"fairseq_qn", "configs", "run_scripts", "tests", "setup.py", "README.md", "LICENSE"}
TEXT = {".py", ".sh", ".yaml", ".yml", ".md", ".txt", ".toml", ".ini", ".json", ""}
DATA = "run_scripts/data/"  # shipped corpora: other people's words
# Written in two parts, so that this file does not hold what it forbids.
# fmt: off
FORBIDDEN = {
    "a package registry's host": r"pypi\.o" r"rg|pythonho" r"sted|files\.pyth" r"on|download\.pyt" r"orch"
    r"|npm" r"js\.(org|com)|anaconda\.o" r"rg|deb\.deb" r"ian",
    "a path of one machine": r"(?<![\w.$}])/"
    r"(work/(main|shared|\.)|ro" r"ot/|ho" r"me/\w|opt/(wheels|pypi)|tmp/w\b|Us" r"ers/)",
    "what lies outside the tree": r"(?<!\.\./)\bsha" r"red/(?!data)"
    r"|(?i:\b(DESIGN|FAIRSEQ|UPSTREAM|STYLE|FACTS)\.md)",
}
# fmt: on


GUIDE = ROOT / "fairseq_qn" / "README.md"
AUTOGRAD = ("forward", "setup_context", "backward", "jvp", "vmap")


def tracked() -> list[str]:
    """Paths of the files under version control; of all files where there is no repository."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]
    return [
        p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts
    ]


def offences(text: str) -> list[str]:
    """What a text names that no tracked file may, as `line: what (the words)`."""
    return [
        f"{number}: {what} ({match.group()})"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, line)
    ]


def undocumented(text: str) -> list[str]:
    """Public functions of a source, methods of public classes included, that lack a docstring or an
    annotation.
    """
    found = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{node.name}.")
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            spec = node.args
            args = [
                *spec.posonlyargs,
                *spec.args,
                *spec.kwonlyargs,
                *filter(None, [spec.vararg, spec.kwarg]),
            ]
            bare = [a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            lacks = [f"annotation of {a}" for a in bare] + ["return annotation"] * (node.returns is None)
            # forward and backward of an autograd Function are described by the class
            if ast.get_docstring(node) is None and not (prefix and node.name in AUTOGRAD):
                lacks.append("docstring")
            found.extend(f"{prefix}{node.name}: no {what}" for what in lacks)

    visit(ast.parse(text).body, "")
    return found


def listed(text: str) -> list[str]:
    """Files of the package in the list of the guide: `folder/file.py`, and `folder/` for its __init__."""
    found, folder = [], ""
    for line in text.partition("## The files")[2].partition("\n## ")[0].splitlines():
        entry = re.match(r" {4}(  )?(?:((?:\w+\.(?:py|c|h) ?)+)|(\S+/))", line)
        if entry:
            folder = (folder if entry[1] else "") + (entry[3] or "")
            found += [folder + name for name in (entry[2] or "").split()] or [folder]
    return found


def defined(path: Path) -> set[str]:
    """`name` and `Class.name` of all that a source defines at its top, or in a class of its top."""

    def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{prefix}{node.name}.")
        return found

    return names(ast.parse(path.read_text("utf-8")).body)


def lost(text: str) -> list[str]:
    """The `file`, `folder/` and `file.py:name` in a text that are not there."""
    missing = []
    for path, name in re.findall(r"`([\w.-]+/|[\w./-]+\.(?:py|c|h|sh|yml|md))(?::([\w.]+))?`", text):
        file = next((f for f in (ROOT / "fairseq_qn" / path, ROOT / path) if f.exists()), None)
        if file is None or (name and name not in defined(file)):
            missing.append(f"{path}:{name}" if name else path)
    return missing


def test_top_level_is_as_drawn() -> None:
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_no_tracked_file_names_a_registry_or_a_machine() -> None:
    texts = [p for p in tracked() if Path(p).suffix in TEXT and not p.startswith(DATA)]
    assert len(texts) > 20
    assert [f"{p}:{o}" for p in texts for o in offences((ROOT / p).read_text("utf-8"))] == []


def test_public_functions_of_quant_are_annotated_and_described() -> None:
    sources = sorted((ROOT / "fairseq_qn" / "quant").glob("*.py"))
    assert len(sources) > 4
    assert [f"{p.name}: {what}" for p in sources for what in undocumented(p.read_text("utf-8"))] == []


def test_long_files_are_listed() -> None:
    """A file over 300 lines is worth a look, not a failure."""
    lines = {p: len((ROOT / p).read_text("utf-8").splitlines()) for p in tracked() if p.endswith(".py")}
    assert lines
    if long := {path: n for path, n in lines.items() if n > 300}:
        warnings.warn(f"over 300 lines: {long}", stacklevel=1)


@pytest.mark.parametrize(
    ("text", "rest"),  # apart, for the same reason
    [
        ("see py{}/simple", "pi.org"),
        ("cd /wo{}/main", "rk"),
        ("open('/ro{}/x')", "ot"),
        ("read sha{}/notes", "red"),
        ("see DES{}.md", "IGN"),
    ],
)
def test_an_offence_is_seen(text: str, rest: str) -> None:
    assert len(offences(f"first line\n{text.format(rest)}\n")) == 1


@pytest.mark.parametrize(
    "text", ["../shared/data", "$HOME/root/x", "cats/work/main", "a shared weight", "https://github.com/x"]
)
def test_an_innocent_line_passes(text: str) -> None:
    assert offences(text) == []


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("def f(x: int) -> int:\n    return x", 1),
        ("def f(x) -> int:\n    'doc'", 1),
        ("def f(*xs, **ks):\n    'doc'", 3),
        ("class A:\n    def f(self):\n        'doc'", 1),
        ("class A:\n    def f(self) -> None:\n        'doc'\ndef _g(x): pass", 0),
    ],
)
def test_undocumented_functions_are_seen(text: str, lacks: int) -> None:
    assert len(undocumented(text)) == lacks


def test_the_version_of_the_distribution_is_that_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--version"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == __version__


def test_the_guide_lists_every_file() -> None:
    files = {p.removeprefix("fairseq_qn/") for p in tracked() if re.fullmatch(r"fairseq_qn/.*\.(py|c|h)", p)}
    found = listed(GUIDE.read_text("utf-8"))
    folders = {re.sub(r"(?<=/)__init__\.py$", "", path) for path in files} | {"hydra_plugins/"}
    assert sorted(found) == sorted(folders) and len(found) > 60


@pytest.mark.parametrize("guide", ["fairseq_qn/README.md", ".github/CONTRIBUTING.md"])
def test_what_a_guide_names_is_there(guide: str) -> None:
    assert lost((ROOT / guide).read_text("utf-8")) == []


def test_what_is_not_there_is_seen() -> None:
    text = (
        "`api.py:save`, `api.py:keep`, `modules/`, `rooms/`, `report.py:SizeReport.of`, `report.py:Size.of`"
    )
    assert lost(text) == ["api.py:keep", "rooms/", "report.py:Size.of"]
    text = (
        "## The files\n\n    api.py of e.py\n    a/ of f.py\n      b.py c.c\n    d.py\n\n## Next\n    g.py"
    )
    assert listed(text) == ["api.py", "a/", "a/b.py", "a/c.c", "d.py"]


def test_the_workflow_runs_what_has_to_pass_on_the_oldest_python() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]["tests"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]] and job["timeout-minutes"] <= 60
    oldest = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text("utf-8"))
    assert oldest[1] in job["strategy"]["matrix"]["python"]
    for script in (step["run"] for step in job["steps"] if "run" in step):
        done = subprocess.run(["bash", "-n", "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
