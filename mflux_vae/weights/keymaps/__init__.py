"""Two-way tables between the key naming of a file and of a network."""
