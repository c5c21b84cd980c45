"""Reports of trainings: one HTML file that needs nothing else, with curves, pictures and what was said."""
