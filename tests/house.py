"""Measures the code outside of tests: `python tests/house.py`."""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 120
MOST_IN_A_ROOM = 10


def files() -> list[Path]:
    return [ROOT / 'main.py', ROOT / 'convert_c4.py', *sorted((ROOT / 'src').rglob('*.py'))]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # pyright: ignore


def main() -> None:
    trees = {file: ast.parse(file.read_text()) for file in files()}
    lines = {file: file.read_text().splitlines() for file in files()}
    nodes = [(node, file) for file, tree in trees.items() for node in ast.walk(tree)]
    functions = sorted((length(node), node.name) for node, _ in nodes
                       if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    classes = sorted((length(node), node.name) for node, _ in nodes if isinstance(node, ast.ClassDef))
    sizes = sorted((len(text), str(file.relative_to(ROOT))) for file, text in lines.items())
    of_main = {alias.name if node.module in (None, 'src') or (ROOT / node.module.replace('.', '/')).is_dir() else node.module
               for node in ast.walk(trees[ROOT / 'main.py'])
               if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('src') for alias in node.names}
    rooms = {room.parent: len(list(room.parent.glob('*.py'))) - 1 for room in ROOT.glob('src/*/__init__.py')}
    print(f'lines {sum(size for size, _ in sizes):,} in {len(sizes)} files; '
          f'longer than {COLUMNS} columns: {sum(len(line) > COLUMNS for text in lines.values() for line in text)}')
    print(f'files: median {statistics.median(size for size, _ in sizes):g}, largest {sizes[-3:]}')
    print(f'functions: ninth decile {functions[int(0.9 * len(functions))][0]}, longest {functions[-3:]}')
    print(f'classes: largest {classes[-3:]}')
    print(f'main(): {next(n for n, name in reversed(functions) if name == "main" and n)} lines at most of any program; '
          f'main.py imports {len(of_main)} of our modules')
    print(f'rooms: the fullest has {max(rooms.values())} modules, of at most {MOST_IN_A_ROOM}')


if __name__ == '__main__':
    sys.exit(main())
