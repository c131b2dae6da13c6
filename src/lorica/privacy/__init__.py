"""Everything that touches single examples or decides what may leave an owner.

Nothing outside this package sees a per-example gradient, a raw batch gradient or the indices of a batch.
"""
