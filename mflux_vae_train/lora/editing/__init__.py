"""Adapters as files: describe, convert, merge, extract and resize them. Networks serve for names and shapes alone."""
