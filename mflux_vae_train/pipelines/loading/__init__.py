"""How parts of a pipeline are found, checked, loaded on first use, and written."""
