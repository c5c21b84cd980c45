"""Training autoencoders: losses, data, the trainer and its command."""
