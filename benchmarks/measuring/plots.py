"""What every picture shares. Figures are made without pyplot, so that none needs a screen or a backend."""

from __future__ import annotations

from typing import Any

import matplotlib

from benchmarks.measuring.table import one_line

matplotlib.rcParams["svg.hashsalt"] = "nested-reft"  # equal numbers give equal files
matplotlib.rcParams["font.family"] = "sans-serif"
matplotlib.rcParams["axes.spines.top"] = False
matplotlib.rcParams["axes.spines.right"] = False

# Of Okabe and Ito: told apart by colour-blind readers.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vPX*"


def literal(text: str) -> str:
    """In one line, for matplotlib, which would take what stands between two dollars for a formula."""
    return one_line(text).replace("$", "\\$")


def style(n: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th of some series; no two of the first 64 have colour and marker in common."""
    rounds, colour = divmod(n, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "marker": MARKERS[(n + rounds) % len(MARKERS)],
        "linestyle": "--" if rounds else "-",
    }
