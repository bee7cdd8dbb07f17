"""The promises of the spec, one per module: each decides one thing, is pure, and is given the time."""
