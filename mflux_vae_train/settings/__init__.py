"""Dataclass fields, flags and YAML."""
