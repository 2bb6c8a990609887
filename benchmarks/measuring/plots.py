"""What every picture shares: a backend without a screen, colours and markers."""

from __future__ import annotations

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


MARKERS = "osD^vPX*"
