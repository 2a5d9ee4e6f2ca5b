"""Checkpoint families: how other projects name and lay out the arrays of their networks, one module per project."""
