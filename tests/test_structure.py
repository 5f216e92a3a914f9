"""The shape of the product: no circle of imports, and no file or class too long to be read at once without a reason."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FILE_LINES: Final = 400
CLASS_LINES: Final = 200


def files(root: Path = ROOT) -> dict[str, Path]:
    """The product's modules by name; a package has the name of its folder."""
    found = {}
    for folder in ("flows", "tasks", "storage", "tidemill"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if (
                parts[0] == "tidemill"
            ):  # the top of the package; of the folders that it holds, the links are not followed
                parts = parts[1:]
            found[".".join(("tidemill", *(part for part in parts if part != "__init__")))] = path
    return found


def imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules of the product each of them imports, anywhere in its text."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
                names = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                graph[name] |= names or {node.module} & modules.keys()
        graph[name].discard(name)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def too_long(root: Path = ROOT, share: float = 1.0) -> Iterator[tuple[str, int]]:
    """(`file.py` or `file.py:Class`, its lines) of each that is longer than the rule, or than a share of it."""
    for path in files(root).values():
        text, name = path.read_text(), path.relative_to(root).as_posix()
        if (lines := len(text.splitlines())) > share * FILE_LINES:
            yield name, lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > share * CLASS_LINES:
                    yield f"{name}:{node.name}", lines


def reasons() -> dict[str, str]:
    """What CONTRIBUTING says of each: `name` -> reason."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Longer than the rule")[2].partition("\n## ")[0]
    return {name: why.strip() for names, why in re.findall(r"^\| (`.*?`) \| (.*?) \|$", section, re.MULTILINE)
            for name in re.findall("`(.*?)`", names)}  # fmt: skip


def test_no_module_imports_itself_through_others() -> None:
    assert circle(imports(files())) == []


def test_what_is_longer_than_the_rule_has_its_reason() -> None:
    unexplained = {name: lines for name, lines in too_long() if len(reasons().get(name, "")) < 40}
    assert not unexplained, f"cut them, or give the reason in CONTRIBUTING.md: {unexplained}"


def test_no_reason_is_left_over() -> None:
    """What is only just within the rule may keep its reason."""
    assert reasons().keys() <= {name for name, _ in too_long(share=0.9)}


# ---- that these tests can fail ---------------------------------------------------------------------------------------
def test_a_circle_a_long_file_and_a_long_class_are_found(tmp_path: Path) -> None:
    for name, text in {
        "tasks/a.py": "from tidemill.tasks import b\n",
        "tasks/b.py": "def f():\n    from tidemill.storage.c import x\n",
        "storage/c.py": "import tidemill.tasks.a\n",
        "flows/long.py": "\n" * 401,
        "flows/deep.py": "class Deep:\n" + "    x = 1\n" * 200,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = circle(imports(files(tmp_path)))
    assert set(found) == {"tidemill.tasks.a", "tidemill.tasks.b", "tidemill.storage.c"}
    assert dict(too_long(tmp_path)) == {"flows/deep.py:Deep": 201, "flows/long.py": 401}
