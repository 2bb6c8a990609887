"""Tests of intervals, tables and what else any measurement needs."""
