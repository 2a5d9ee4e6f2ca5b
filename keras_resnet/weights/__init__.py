"""Weights from files, named sources and the package itself; one small file per origin and per format."""
