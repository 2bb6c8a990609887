"""Tests of the differentiable forward and of its rollout forms."""
