"""What a run would see in a folder of images, before it."""
