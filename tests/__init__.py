"""Tests, in the rooms of what they test; helpers of several tests are in ``oracles``."""
