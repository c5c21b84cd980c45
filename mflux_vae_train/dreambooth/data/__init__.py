"""Images and captions of a run, their encodings, and micro-batches."""
