"""Train on latents: words (Textual Inversion), and adapters or the whole U-Net."""
