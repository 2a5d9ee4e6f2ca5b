"""File formats that weights come in: one module per format, each of which returns arrays by name and never runs code."""
