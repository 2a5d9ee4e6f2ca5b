"""Weights from files, named sources and the package itself, and their strict assignment to a model."""
