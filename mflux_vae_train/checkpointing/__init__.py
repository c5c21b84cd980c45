"""State, checkpoints and the lock of a run folder."""
