"""Tests of one run: its spec, its resumption, its evaluation."""
