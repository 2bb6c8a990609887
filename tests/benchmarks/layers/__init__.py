"""Tests of the bench for layer subsets."""
