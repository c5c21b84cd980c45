"""Text encoders and tokenizers of diffusion pipelines, driven by their published configuration files."""
