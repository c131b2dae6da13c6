"""What the server can do with aggregated updates, whatever the method: all of it functions of released tensors."""
