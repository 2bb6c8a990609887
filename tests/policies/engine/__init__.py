"""Tests of decoding, against fresh forwards on every prefix."""
