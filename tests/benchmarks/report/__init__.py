"""Tests of what a comparison shows."""
