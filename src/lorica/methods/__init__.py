"""Federated LoRA methods, one file each. Code outside this package never checks the name of a method."""
