"""Faster operations for Linux CPUs, in the compiled module `_native`; `extension` loads it."""
