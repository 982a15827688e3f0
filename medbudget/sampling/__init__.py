"""Draw images: the sampler, mixed words, and inpainting."""
