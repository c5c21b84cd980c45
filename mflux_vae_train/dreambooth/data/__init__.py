"""Images and captions of a run, and micro-batches from them."""
