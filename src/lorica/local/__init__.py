"""What a client does with a noisy gradient before its optimiser sees it: all of it post-processing."""
