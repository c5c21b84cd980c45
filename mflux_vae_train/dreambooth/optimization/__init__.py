"""Trainable networks, objective, optimizer and learning checks."""
