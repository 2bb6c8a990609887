"""Tests of names, fields, errors and plug-ins."""
