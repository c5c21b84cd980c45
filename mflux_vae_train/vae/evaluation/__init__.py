"""Measure and show an autoencoder on images: validation, reconstruction of a data set, text of metrics."""
