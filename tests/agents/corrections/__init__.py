"""Tests of the corrections: closed forms, contracts, their products."""
