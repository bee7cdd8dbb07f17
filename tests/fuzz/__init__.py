"""Campaigns of damaged input."""
