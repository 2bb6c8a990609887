"""Tests of checkpoints, against transformers."""
