"""Compare the checkpoints of a run: draw, measure, recommend."""
