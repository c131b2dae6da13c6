"""Transformations of the noisy gradient on the client and its optimisers: all of it post-processing."""
