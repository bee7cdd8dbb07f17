"""The training run: a supervisor that forks one process per rank, and what each rank does."""
