"""Measures the size of the code outside of tests: `python tests/house.py`. tests/test_house.py checks the limits."""

import ast
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 120


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # pyright: ignore


def own_modules(tree: ast.Module) -> set[str]:
    """The modules of `src` that a file imports. `from src.room import a, b` counts as two."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'src':
            is_room = (ROOT / str(node.module).replace('.', '/')).is_dir()
            found |= {f'{node.module}.{alias.name}' for alias in node.names} if is_room else {node.module}
    return found


def measures() -> dict[str, Any]:
    """The figures by name. Files, functions and classes are lists of (length, name), the longest last."""
    files = [ROOT / 'main.py', ROOT / 'convert_c4.py', *sorted((ROOT / 'src').rglob('*.py'))]
    trees = {file: ast.parse(file.read_text('utf-8')) for file in files}
    lines = {file: file.read_text('utf-8').splitlines() for file in files}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = sorted((length(node), node.name) for node in nodes
                       if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {
        'lines': sum(map(len, lines.values())),
        'files': sorted((len(text), str(file.relative_to(ROOT))) for file, text in lines.items()),
        'columns': max(len(line) for text in lines.values() for line in text),
        'functions': functions,
        'classes': sorted((length(node), node.name) for node in nodes if isinstance(node, ast.ClassDef)),
        'main': next(length(node) for node in trees[ROOT / 'main.py'].body
                     if isinstance(node, ast.FunctionDef) and node.name == 'main'),
        'imports of main.py': own_modules(trees[ROOT / 'main.py']),
        'rooms': {room.parent.name: len(list(room.parent.glob('*.py'))) - 1 for room in ROOT.glob('src/*/__init__.py')},
    }


if __name__ == '__main__':
    found = measures()
    sizes, lengths = ([size for size, _ in found[name]] for name in ('files', 'functions'))
    print(f'{found["lines"]:,} lines of at most {found["columns"]} columns in {len(sizes)} files')
    print(f'files: median {statistics.median(sizes):g}, largest {found["files"][-3:]}')
    print(f'functions: {len(lengths)}, ninth decile {lengths[int(0.9 * len(lengths))]}, longest {found["functions"][-3:]}')
    print(f'classes: largest {found["classes"][-3:]}')
    print(f'main.py: main() has {found["main"]} lines; {len(found["imports of main.py"])} modules of src are imported')
    print(f'modules in each folder of src, without __init__.py: {found["rooms"]}')
