"""Programs that make the embedded pipeline."""
