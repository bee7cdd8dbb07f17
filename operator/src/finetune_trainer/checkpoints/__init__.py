"""What a checkpoint is, which to resume from, and which to delete. No module here but `promote` imports torch."""
