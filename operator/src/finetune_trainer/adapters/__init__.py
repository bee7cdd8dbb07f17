"""LoRA adapters: what one holds, and several composed into one that a server can load."""
