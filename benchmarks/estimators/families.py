"""The registered corrections by what they declare: a ratio, what is done to it, what a token's weight is made of."""

from __future__ import annotations

from agents.corrections import GEOMETRIES, OPERATORS, traits
from benchmarks.measuring.table import Table
from registry import corrections

EDGES = ("none", "pi / mu", "pi_old / mu and pi / pi_old", "pi / pi_old")


def families() -> Table:
    """A row for each ratio and operator, a column for each geometry; components as their defaults make them."""
    declared = {id: traits(corrections.make(id)) for id in corrections}
    rows = []
    for edge in EDGES:
        for operator in OPERATORS:
            alike = {id: one.geometry for id, one in declared.items() if (one.edge, one.operator) == (edge, operator)}
            if alike:
                cells = (", ".join(f"`{id}`" for id in alike if alike[id] == geometry) for geometry in GEOMETRIES)
                rows.append([edge, operator, *cells])
    return Table(["ratio", "operator", *GEOMETRIES], rows, left=tuple(range(2 + len(GEOMETRIES))))
