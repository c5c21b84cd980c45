"""Reference implementations of projects without a package."""
