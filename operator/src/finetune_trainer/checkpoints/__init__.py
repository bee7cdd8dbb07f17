"""What a checkpoint is, which to resume from, and which to delete. Nothing here imports torch."""
