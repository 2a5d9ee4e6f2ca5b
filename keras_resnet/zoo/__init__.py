"""Architectures as data (`ResNetConfig`, `VGGConfig`), the table of named variants, and the builders that read them."""
