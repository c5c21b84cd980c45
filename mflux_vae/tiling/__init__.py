"""Large images: tiles, strips and the memory they need."""
