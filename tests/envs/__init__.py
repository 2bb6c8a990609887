"""Tests of the environments, their prompts and rewards."""
