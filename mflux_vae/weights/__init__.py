"""Weights: files, key tables and strict loading."""
