#!/usr/bin/env python
"""Benchmarks: every file in `scripts/benchmarks/` is a command of the same name."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

FOLDER = Path(__file__).resolve().parent / "benchmarks"


class Commands(click.Group):
    """Imports only the command that runs, since some need libraries that others do not."""

    def list_commands(self, context):
        files = [file for file in FOLDER.glob("*.py") if f"\ndef {file.stem}(" in file.read_text(encoding="utf-8")]
        return sorted(file.stem for file in files)

    def get_command(self, context, name):
        if name not in self.list_commands(context):
            return None
        return getattr(importlib.import_module(f"benchmarks.{name}"), name)


@click.command(cls=Commands)
def main():
    """Measure speed. Alternatives take turns within one run, and a control compares one of them with itself.

    Example: scripts/benchmark.py zoo --pairs 31
    """


if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER.parent)]
    main()
