"""Autoencoder networks, driven by their configurations. They know no file, checkpoint name or preset."""
