"""Folders of images: which entries are used, and why the others are not."""
