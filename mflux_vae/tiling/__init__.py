"""Process large images in tiles or strips, and estimate the memory of a call."""
