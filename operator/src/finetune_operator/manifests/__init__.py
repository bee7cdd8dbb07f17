"""Pure builders of whole child objects, one module per child. Called by `lifecycle`; they decide nothing."""
