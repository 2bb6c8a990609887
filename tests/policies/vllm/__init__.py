"""Tests of skip samplers, divergences and patches."""
