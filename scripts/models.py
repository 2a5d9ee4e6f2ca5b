#!/usr/bin/env python
"""Write what is derived from the table of variants: docs/models.md, and the constructors in keras_resnet/__init__.pyi.

A test checks that both files are up to date.
"""

import argparse
import inspect
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_resnet.models.build import outline
from keras_resnet.models.registry import parameters
from keras_resnet.weights.files import open_weights
from keras_resnet.weights.sources import OWN, WeightSource, built_in_sources, packaged
from keras_resnet.zoo.counting import Counts, arithmetic, count
from keras_resnet.zoo.variants import NOTES, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
TARGET, STUB = ROOT / "docs" / "models.md", ROOT / "keras_resnet" / "__init__.pyi"
MARK = "# ---------------------------------------------------------------- written by scripts/models.py\n"
HEAD = """# Models

This page lists all models of the zoo with their sizes, and the pretrained weights of each. `scripts/models.py` generates it
from the table of variants; do not edit it by hand.

```python
import keras_resnet as kr

model = kr.resnet50(weights="torchvision/resnet50.IMAGENET1K_V2")  # downloaded once, and checked against its sha256
model = kr.resnet50(num_classes=10, input_shape=(96, 96, 3))  # random weights, another head, another size
model = kr.resnet50(include_top=False, pooling="avg")  # features without a classifier
model = kr.resnet50(features_only=["stage3", "stage4"])  # a dict of feature maps, e.g. for detection
kr.list_models("resnext*")  # names that match a pattern
kr.list_weights("*/resnet50.*")  # weights of a model
print(kr.model_info("resnet50"))  # its stages and sizes
```

All fields of `ResNetConfig` and `VGGConfig` are arguments too, for example `kr.resnet50(output_stride=8, drop_path=0.1)`.

## What the names mean

| name | architecture | source |
|---|---|---|
| `resnet50` | v1.5, as in torchvision and timm: the 3×3 convolution of a bottleneck has the stride | arXiv 1512.03385 |
| `resnet50_v1` | the first 1×1 has the stride, as in keras.applications | arXiv 1512.03385 |
| `resnet50c`, `50d`, `50s`, `50t` | three 3×3 convolutions as the stem, of different widths; D and T also average in \
the shortcut | arXiv 1812.01187, timm |
| `resnetv2_50`, `preresnet110` | pre-activation: norm and ReLU come before each convolution | arXiv 1603.05027 |
| `resnetv2_50_keras` | pre-activation as in keras.applications, the stride in the last block of a stage | keras.applications |
| `resnetv2_50x3_bit` | Big Transfer, three times as wide, with group norm and weight standardisation | arXiv 1912.11370 |
| `resnext50_32x4d` | grouped convolutions: 32 groups of 4 channels | arXiv 1611.05431 |
| `wide_resnet50_2` | the 3×3 convolutions twice as wide | arXiv 1605.07146 |
| `seresnet50`, `seresnext50_32x4d` | with squeeze-and-excitation | arXiv 1709.01507 |
| `resnetrs50` | ResNet-RS | arXiv 2103.07579 |
| `resnetblur50` | blurred before subsampling | arXiv 1904.11486 |
| `resnet20` … `resnet1202` | for CIFAR. The suffix names the shortcut where shapes change: none, `_a_fixup` and `_a_avg` for \
three forms of option A (no parameters), `_b` for projections there, `_c` for projections in every block | arXiv 1512.03385, \
section 4.2 |
| `wrn28_10` | Wide ResNet for CIFAR: 28 layers, ten times as wide | arXiv 1605.07146 |
| `plain20` | the ResNet without shortcuts, for comparisons | arXiv 1512.03385 |
| `cifar_speed` | a wide, shallow plain net for the most accuracy per hour | arXiv 2404.00498 |
| `vgg16`, `vgg16_bn` | VGG, without and with batch norm | arXiv 1409.1556 |
| `vgg16_bn_w16` | for CIFAR, with 16 per cent of the width; any width from 1 to 200 works | |
| `vgg16_bn_w16_grown26` | the same, grown by 26 layers | [Growing a trained network](growth.md) |

## How to read the tables

Parameters are the trainable ones. Multiply-adds are those of convolutions and dense layers, for one image of the input size.
`Top-1` is the best published accuracy, in per cent, among the listed weights. Each was measured by its own publisher, with
its own recipe and image size, so the numbers compare recipes as much as networks. The accuracies of torchvision and akamaster
are from their documentation, those of keras.applications from keras.io, and those of timm from its
`results/results-imagenet.csv` at the size given here (which has none for weights of ImageNet-21k).

"""
SECTIONS = (
    ("ImageNet residual networks", lambda config: config.family == "resnet" and config.input_size > 32),
    ("CIFAR residual and plain networks", lambda config: config.family == "resnet" and config.input_size <= 32),
    ("VGG", lambda config: config.family == "vgg"),
)
COLUMNS = "| model | parameters | multiply-adds | input | weights | top-1 | note |\n|---|---:|---:|---:|---|---:|---|\n"
WEIGHT_COLUMNS = "| weights | data set | preprocessing | evaluated at | top-1 | licence |\n|---|---|---|---:|---:|---|\n"


def sizes(config) -> Counts:
    """Arithmetic where there is one; VGGs are outlined and walked."""
    return arithmetic(config) if config.family == "resnet" and not config.growth else count(outline(config))


def sources():
    """Name -> `WeightSource` of all weights, those in the package included."""
    return built_in_sources() | {f"{OWN}/{model}.{tag}": _own(model, path) for (model, tag), path in packaged().items()}


def _own(model, path):
    card = open_weights(path).card
    known = {key: card.weights[key] for key in ("dataset", "accuracy", "licence") if key in card.weights}
    return WeightSource(model, path, preprocessing=card.mode, size=card.preprocessing["size"][0], **known)


def large(number):
    """1814073344 -> 1.81 G."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def row(name, config):
    """One line of the table."""
    counts = sizes(config)
    own = {key: source for key, source in sources().items() if source.model == name}
    best = max(own.values(), key=lambda source: source.accuracy or 0, default=None)
    top = f"{best.accuracy:.2f}" if best and best.accuracy else ""
    projects = sorted({key.split("/")[0] for key in own})
    weights = f"{len(own)}: {', '.join(projects)}" if own else ""
    side = f"{config.input_size}²"
    return f"| `{name}` | {counts.trainable:,} | {large(counts.macs)} | {side} | {weights} | {top} | {NOTES.get(name, '')} |\n"


def weight_row(item):
    """One line of the table of weights."""
    name, source = item
    accuracy = f"{source.accuracy:.2f}" if source.accuracy else "not given"
    return f"| `{name}` | {source.dataset} | {source.preprocessing} | {source.size}² | {accuracy} | {source.licence} |\n"


def document():
    """The whole file."""
    built_in = {name: VARIANTS[name] for name in sorted(VARIANTS)}
    text = HEAD
    for title, belongs in SECTIONS:
        rows = [row(name, config) for name, config in built_in.items() if belongs(config)]
        text += f"## {title}\n\n{COLUMNS}{''.join(rows)}\n"
    text += "## Pretrained weights\n\nPass a name from this table as `weights=`.\n\n"
    text += f"{WEIGHT_COLUMNS}{''.join(map(weight_row, sorted(sources().items())))}\n"
    return text.rstrip("\n") + "\n"


def stub() -> str:
    """The type stub: what is written by hand, then the arguments of each family and a constructor per variant."""
    text = STUB.read_text(encoding="utf-8").partition(MARK)[0] + MARK
    families = {"ResNetOptions": "resnet50", "VGGOptions": "vgg16"}
    for title, example in families.items():
        text += f"\nclass {title}(typing.TypedDict, total=False):\n"
        for parameter in parameters(VARIANTS[example]):
            if parameter.name not in ("weights", "num_classes"):
                text += f"    {parameter.name}: {_annotation(parameter.annotation)}\n"
    text += "\n"
    for name, config in VARIANTS.items():
        title = "VGGOptions" if config.family == "vgg" else "ResNetOptions"
        text += (
            f"def {name}(\n    *,\n    weights: str | os.PathLike[str] | None = None,\n    num_classes: int | None = None,\n"
            f"    **options: typing.Unpack[{title}],\n) -> keras.Model: ...\n"
        )
    return text


def _annotation(kind) -> str:
    """A type as the stub writes it."""
    text = inspect.formatannotation(kind)
    for long, short in {"keras_resnet.zoo.config.": "", "collections.abc.": "typing."}.items():
        text = text.replace(long, short)
    return re.sub(r"keras\.src\.[\w.]*\.(\w+)", r"keras.\1", text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for target, made in ((TARGET, document()), (STUB, stub())):
        target.write_text(made, encoding="utf-8")
        sys.stdout.write(f"{target.relative_to(ROOT)}\n")
