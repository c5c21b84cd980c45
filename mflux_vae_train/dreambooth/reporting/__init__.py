"""What a run shows: previews, charts, report, model card."""
