"""Memory of matrix products: updates bring another number of rows each time, and none of them stays."""

from __future__ import annotations

import subprocess
import sys

GROWTH = """
import psutil, torch
from policies.model.products import product
x, weight = torch.randn(1000, 500), torch.randn(300, 500)
held = []
for rows in range(1, 801):
    product(x[:rows], weight)
    held.append(psutil.Process().memory_info().rss)
print(held[-1] - held[199])
"""


def test_products_of_ever_other_numbers_of_rows_leave_nothing_behind() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 80e6  # 350e6 where each of the 600 leaves what was made for it
