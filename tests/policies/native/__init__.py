"""Tests of the compiled kernels by themselves."""
