"""Measurements behind the project's claims, one script per claim; `python -m benchmarks.<name>`."""
