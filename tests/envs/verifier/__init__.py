"""Tests of verdicts: policy, properties, hostile texts, workers."""
