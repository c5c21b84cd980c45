"""Previews, charts, report and model card of a run."""
