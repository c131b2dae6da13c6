"""What is learned, from which records.

`kind.py` says what a kind of task is, and `kinds/` has one file for each. `loading.py` is what the rest of Lorica
calls: it reads the sources (`readers.py`, `owners.py`, `labels.py`), has the kind make `records.py` of them (with
`text.py`, `images.py`, `questions/` or `causal/`) and takes the kind's objective (in `classification.py` or the same
folders). `groups.py` makes one record of all records of a patient, and `partition.py` divides records among simulated
clients.
"""
