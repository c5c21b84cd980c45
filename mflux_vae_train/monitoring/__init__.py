"""Progress, trackers and the HTML report."""
