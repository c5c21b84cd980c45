"""Console, progress, trackers and the HTML report."""
