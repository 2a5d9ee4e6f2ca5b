#!/usr/bin/env python
"""Write docs/why-residual.md from its text (why-residual.md next to this file) and the tables in docs/results/.

In the text, `<!-- with NAME -->` … `<!-- end -->` stays only if `docs/results/NAME.csv` exists, and `{NAME.fact}` is replaced
by what the experiment's `facts` returns, or by a size of the run. The page therefore shows nothing that was not measured.
"""

import argparse
import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lab

TEXT, PAGE = HERE / "why-residual.md", lab.ROOT / "docs" / "why-residual.md"
# Experiment of each result.
EXPERIMENTS = {
    "degradation": "degradation",
    "learn_identity": "learn_identity",
    "grow_vgg": "grow_vgg",
    "grow_imagenet": "grow_vgg",
    "gates": "gates",
    "match_scale": "match_scale",
    "grow_resnet": "grow_resnet",
    "grow_pretrained": "grow_pretrained",
    "no_forgetting": "no_forgetting",
}
SECTION = re.compile(r"<!-- with (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def render(results=lab.RESULTS):
    """The page, with the sections whose results are in a folder."""

    def section(match):
        name, text = match.groups()
        return fill(text, name, results) if (results / f"{name}.csv").exists() else ""

    return re.sub(r"\n{3,}", "\n\n", SECTION.sub(section, TEXT.read_text(encoding="utf-8")))


def fill(text, name, folder):
    """Put facts and sizes into a section."""
    results = lab.Results.read(name, folder)
    sizes = {key: lab.written(value) for key, value in results.about.items()}
    facts = {**sizes, **importlib.import_module(EXPERIMENTS[name]).facts(results)}
    return re.sub(r"\{" + name + r"\.(\w+)\}", lambda match: facts[match.group(1)], text)


def write():
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for result, module in EXPERIMENTS.items():
        if (lab.RESULTS / f"{result}.csv").exists():
            lab.draw(result, importlib.import_module(module), lab.RESULTS)
    write()
