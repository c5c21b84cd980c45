"""Adapters for host packages."""
