"""What came of a run, as one page, as JSON and as a model card. Needs no torch."""
