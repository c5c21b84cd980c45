"""Image files: what format a file has, and its pixels as a viewer shows them. Uses Pillow."""
