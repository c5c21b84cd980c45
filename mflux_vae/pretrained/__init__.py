"""From what a user names to an autoencoder's kind, configuration and tensors: presets, hub, folders, files."""
