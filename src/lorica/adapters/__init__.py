"""LoRA factors in a Hugging Face model: where they sit, what they hold, how they are exported."""
