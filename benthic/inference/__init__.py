"""Continuous batching on the paged latent cache: integers decide, tensors follow."""
