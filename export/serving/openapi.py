"""The server's own description in OpenAPI 3.1."""


def describe(version):
    """The OpenAPI document.

    Args:
        version: the server's version.

    Returns:
        dict
    """
    return {"openapi": "3.1.0", "info": {"title": "resnet-export serve", "version": version}, "paths": {}}
