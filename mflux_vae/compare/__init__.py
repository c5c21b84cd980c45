"""`mflux-vae compare`: several autoencoders on the same pictures, measured, timed and shown side by side."""
