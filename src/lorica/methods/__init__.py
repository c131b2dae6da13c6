"""Federated LoRA methods, one file each. Nothing outside this package tests a method's name."""
