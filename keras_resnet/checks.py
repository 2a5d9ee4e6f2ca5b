"""What messages are made of."""

import difflib

LISTED = 12


def nearest(word, options):
    """The end of a message about an unknown name: what may have been meant, or all there is where that is little.

    Args:
        word: what was given.
        options: what there is.

    Returns:
        `"; did you mean 'a' or 'b'?"`, `"; choose from a, b"`, or `""` where nothing is near among many.
    """
    options = [str(option) for option in options]
    if near := difflib.get_close_matches(str(word), options, n=3):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; choose from {', '.join(options)}" if 0 < len(options) <= LISTED else ""


def first_line(error):
    """The first line of an error's text without its full stop, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
