"""The difference of two models' weights: made, applied, verified; exact to the bit, without torch."""
