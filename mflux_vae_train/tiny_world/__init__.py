"""Programs that train the embedded pipeline: its world, recipe and checker."""
