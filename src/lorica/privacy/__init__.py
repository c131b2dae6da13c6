"""All code that handles single examples or decides what may leave an owner.

Code outside this package never sees per-example gradients, raw batch gradients or the indices of a batch.
"""
