"""Faster operations for Linux CPUs."""
