"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Optional data beside the checkout (public data sets in their original formats, reward cases, model scripts)."""
    named = os.environ.get("NESTED_REFT_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no shared data: set NESTED_REFT_SHARED to a folder that has data/ and reward_cases/")
    return folder
