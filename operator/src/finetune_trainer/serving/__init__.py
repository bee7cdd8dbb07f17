"""Answers of a promoted model: once on the command line, or over HTTP."""
