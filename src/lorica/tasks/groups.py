"""A unit of privacy above the record: all records of a patient, a user or a device as one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from lorica.errors import UserError
from lorica.tasks.labels import UNKNOWN, is_text
from lorica.tasks.readers import Source
from lorica.tasks.records import Batch, Records, Task, digest, stack_digests

LONGEST_KEY = 1000


@dataclass(frozen=True, eq=False)
class GroupedRecords(Records):
    """Groups of records; group i trains on the records `members[starts[i] : starts[i] + sizes[i]]`.

    A group enters a batch as one example, with all rows of all its records: it is sampled once and clipped once. Its
    loss is the mean over its records' losses, so that its gradient does not grow with its size and the clip does not
    bite large groups harder.

    Attributes:
        labels: (n,) the most frequent label among the records that a group keeps, the least of equals; of numbers to
            predict, the mean.
        digests: (n, 32) uint8, over the digests of all records of a group, kept or not.
        records: what the groups are made of; shared between subsets.
        members: int64 positions in `records`, group after group; in each, those that it keeps and then the rest, both
            in the records' order.
        starts: (n,) int64 offsets into `members`.
        sizes: (n,) int64, records that each group keeps.
        totals: (n,) int64, records that each group has.
    """

    records: Records
    members: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    totals: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @property
    def row_counts(self) -> np.ndarray:
        return self._row_counts

    @cached_property
    def _lengths(self) -> np.ndarray:
        longest: np.ndarray = np.maximum.reduceat(self.records.lengths[self._kept], self._offsets)
        return longest

    @cached_property
    def _row_counts(self) -> np.ndarray:
        total: np.ndarray = np.add.reduceat(self.records.row_counts[self._kept], self._offsets)
        return total

    @property
    def _kept(self) -> np.ndarray:
        return self._members_of(np.arange(len(self)), self.sizes)

    @property
    def _offsets(self) -> np.ndarray:
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    def _members_of(self, indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Positions in `records` of the first `sizes` members of the groups at `indices`, one group after another."""
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places: np.ndarray = self.members[np.repeat(self.starts[indices], sizes) + within]
        return places

    def subset(self, indices: np.ndarray) -> GroupedRecords:
        return replace(
            self,
            labels=self.labels[indices],
            digests=self.digests[indices],
            starts=self.starts[indices],
            sizes=self.sizes[indices],
            totals=self.totals[indices],
        )

    def tags(self) -> tuple[np.ndarray, np.ndarray]:
        """A group is known again by any of its records, kept or not."""
        return self.records.digests[self._members_of(np.arange(len(self)), self.totals)], self.totals

    def batch(self, indices: np.ndarray) -> Batch:
        inner = self.records.batch(self._members_of(indices, self.sizes[indices]))
        sizes = torch.from_numpy(self.sizes[indices])
        group = torch.repeat_interleave(sizes)
        record = torch.arange(len(group)) if inner.example_of_row is None else inner.example_of_row
        return replace(inner, example_of_row=group[record], weights=inner.row_weights() / sizes[group[record]])


def group_keys(source: Source, column: str) -> np.ndarray:
    """(n,) text: which group each record belongs to.

    Raises:
        UserError: the column holds neither text nor integers, or texts that are no names.
    """
    import pyarrow as pa
    from pyarrow import compute

    values = source.table.column(column)
    if not (is_text(values.type) or pa.types.is_integer(values.type)):
        problem = f"the column of {source.name} holds {values.type}, which cannot identify groups"
        raise UserError("privacy.group", column, problem, "choose a column of text or integers")
    texts = values.cast(pa.large_string())
    # An array of text takes the length of the longest for all.
    if compute.max(compute.utf8_length(texts)).as_py() > LONGEST_KEY:
        problem = f"the column of {source.name} has values of more than {LONGEST_KEY} characters"
        raise UserError("privacy.group", column, problem, "choose a column of names or numbers")
    keys: np.ndarray = texts.to_numpy()
    return keys.astype(str)


def by_group(task: Task, most: int, divided: bool, seed: int) -> Task:
    """The task with every group of its training records as one record.

    Args:
        most: records of a group that are used.
        divided: the data says which owner's the records are. A group with several owners then is one with each of them,
            of that owner's records, and each owner's guarantee is about those.
        seed: public.
    """
    assert task.groups is not None
    keys = task.groups
    if not divided or task.owners is None:
        return replace(task, train=grouped(task.train, keys, most, seed), owners=None)
    keys = np.array([f"{owner} {key}" for owner, key in zip(task.owners.of, keys, strict=True)])
    firsts = np.sort(np.unique(keys, return_index=True)[1])
    owners = replace(task.owners, of=task.owners.of[firsts])
    return replace(task, train=grouped(task.train, keys, most, seed), owners=owners)


def grouped(records: Records, keys: np.ndarray, most: int, seed: int) -> GroupedRecords:
    """Make each group of records one record, of at most `most` of its records.

    Leaving one whole group out changes nothing about the others, neither which of their records are kept nor
    their order among themselves: a record's rank within its group is a hash of the public seed and the record alone.
    Bounding contributions this way: Amin et al., arXiv 1905.13177 (records of one user); McMahan et al., arXiv
    1710.06963 (a user as the unit of DP-SGD).

    Groups come in the order in which they first appear. The digests, and so the fingerprint, depend on the records and
    on how they are grouped, not on `most`, on the seed or on how the groups are called.

    Args:
        keys: (len(records),), what names each record's group: text or integers, no nulls.
        most: records that a group keeps, at least 1. A pass holds at least one group whole, so that `most` bounds its
            memory: at most `most` times the rows of a record, padded to the longest.
        seed: public.

    Raises:
        ValueError: there are not as many keys as records, or `most` is less than 1.
    """
    if len(keys) != len(records) or most < 1:
        raise ValueError(f"{len(keys)} keys for {len(records)} records, at most {most} records per group")
    _, firsts, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(firsts))[group]
    by_group = np.split(np.argsort(order, kind="stable"), np.cumsum(np.bincount(order))[:-1])
    kept = [_chosen(records.digests, members, most, seed) for members in by_group]
    rest = [np.setdiff1d(members, chosen) for members, chosen in zip(by_group, kept, strict=True)]
    totals = np.array([len(members) for members in by_group], dtype=np.int64)
    return GroupedRecords(
        labels=np.array([_label(records.labels[members]) for members in kept], dtype=records.labels.dtype),
        digests=stack_digests([digest(bytes(row) for row in records.digests[members]) for members in by_group]),
        records=records,
        members=np.concatenate([part for pair in zip(kept, rest, strict=True) for part in pair]),
        starts=np.cumsum(totals) - totals,
        sizes=np.array([len(members) for members in kept], dtype=np.int64),
        totals=totals,
    )


def _label(labels: np.ndarray) -> float:
    if not np.issubdtype(labels.dtype, np.integer):
        return float(labels.mean())
    known = labels[labels != UNKNOWN]
    return float(np.bincount(known).argmax() if len(known) else UNKNOWN)


def _chosen(digests: np.ndarray, members: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The `most` members of least hash, in their order; equal records keep theirs."""
    if len(members) <= most:
        return members
    prefix = f"{seed}:group:".encode()
    ranks = [hashlib.sha256(prefix + bytes(digests[member])).digest() for member in members]
    chosen = sorted(range(len(members)), key=ranks.__getitem__)[:most]
    return np.asarray(members[np.sort(chosen)])
