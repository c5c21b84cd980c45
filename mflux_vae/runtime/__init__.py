"""Devices, BLAS and process-wide settings."""
