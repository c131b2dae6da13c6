"""LoRA factors in a Hugging Face model: placement, values, export."""
