"""Autoencoders of video models, for single images."""
