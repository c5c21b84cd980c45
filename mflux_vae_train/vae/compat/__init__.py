"""Configuration files of other VAE trainers."""
