"""Limits on the sizes of files, functions and classes; `python tests/house.py` prints the figures."""

import statistics

from house import COLUMNS, measures


def test_files_functions_classes_and_rooms_keep_their_limits():
    found = measures()
    sizes, functions = [size for size, _ in found['files']], [size for size, _ in found['functions']]
    assert found['columns'] <= COLUMNS
    assert statistics.median(sizes) <= 150 and found['files'][-1][0] <= 330, found['files'][-5:]
    assert functions[int(0.9 * len(functions))] <= 35 and functions[-1] <= 70, found['functions'][-5:]
    assert all(size <= 120 or name == 'MosaicGPT' for size, name in found['classes']), found['classes'][-5:]
    assert found['main'] <= 60 and len(found['imports of main.py']) <= 12, found['imports of main.py']
    assert all(n <= 10 for n in found['rooms'].values()), found['rooms']
