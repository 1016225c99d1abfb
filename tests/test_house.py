"""What a reader meets: readable sizes, imports that go one way, a map of all modules."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "formats", "isolation", "tools")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_files_functions_and_docstrings_can_be_read_in_one_sitting():
    for path, tree in TREES.items():
        assert len((ROOT / path).read_text().splitlines()) <= 400, path
        assert len(ast.get_docstring(tree).splitlines()) <= 25, path
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Nonlocal), path
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)


def test_imports_go_one_way_and_nothing_imports_the_loop():
    names = {module_name(path) for path in TREES}
    left = {module_name(path): imported(tree) & names for path, tree in TREES.items()}
    assert not any("train" in of for of in left.values())
    while free := [name for name, of in left.items() if not of & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these import each other in a circle"


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    assert all(f"[{path}]({path})" in text for path in map(str, TREES) if "/" not in path)
