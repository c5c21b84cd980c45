"""Training reports as one self-contained HTML file with curves, images and the log."""
