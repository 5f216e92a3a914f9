"""A few cells of a matrix of settings in which all values of any two of them meet, or of any three.

Greedy, as in Cohen, Dalal, Fredman and Patton, "The AETG System", IEEE Transactions on Software Engineering 23 (1997), but with
nothing drawn at random.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, product

Cell = dict[str, str]
"""A value of each setting."""


def covering(settings: Mapping[str, Sequence[str]], strength: int) -> list[Cell]:
    """Cells in which all values of any `strength` of the settings meet."""
    lacking = meetings(settings, strength)
    cells = []
    while lacking:
        cell = dict(next(iter(lacking)))
        # Those with many values first: of them most is lacking
        for name in sorted(settings.keys() - cell.keys(), key=lambda name: (-len(settings[name]), name)):
            cell[name] = max(settings[name], key=lambda value: _gained(cell | {name: value}, name, lacking, strength))
        cells.append({name: cell[name] for name in settings})
        for met in _in_cell(cell, strength):
            lacking.pop(met, None)
    return cells


Meeting = tuple[tuple[str, str], ...]
"""Of some settings a value each, sorted by the settings' names."""


def meetings(settings: Mapping[str, Sequence[str]], strength: int) -> dict[Meeting, None]:
    """All values that are to meet, in a fixed order."""
    return {
        tuple(zip(names, values, strict=True)): None
        for names in combinations(sorted(settings), strength)
        for values in product(*(settings[name] for name in names))
    }


def _in_cell(cell: Cell, strength: int) -> list[Meeting]:
    return list(combinations(sorted(cell.items()), strength))


def _gained(cell: Cell, name: str, lacking: Mapping[Meeting, None], strength: int) -> int:
    """How many of what is lacking meets in a cell by its value of this setting."""
    others = sorted(cell.items() - {(name, cell[name])})
    return sum(tuple(sorted((*chosen, (name, cell[name])))) in lacking for chosen in combinations(others, strength - 1))
