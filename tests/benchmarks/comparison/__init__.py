"""Tests of many runs: grids, launchers, plans, outcomes."""
