"""What a Mac or an NVIDIA card computes, and what it takes: see `__main__`."""
