"""Federated LoRA fine-tuning under differential privacy."""
