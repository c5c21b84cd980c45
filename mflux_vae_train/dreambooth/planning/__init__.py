"""Decisions of a run before its first update."""
