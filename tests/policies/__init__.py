"""Tests of the language model and of what rollouts and updates compute with it."""
