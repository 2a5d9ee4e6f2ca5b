#!/usr/bin/env python
"""Add the weights of a finished training to the package as those of a variant, and update docs/weights.md."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

import keras_resnet as kr
from keras_resnet.weights.files import open_weights
from keras_resnet.weights.sources import OWN, PACKAGED, packaged

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "weights.md"
LIMIT = 6_000_000
HEAD = """# Weights in the package

These weights are part of the package, so they load without a network connection:

```python
import keras_resnet as kr

model = kr.resnet20(weights="cifar10")
```

`resnet-export` and `resnet-train` take `--weights cifar10` wherever they take the name of a model.

The accuracy is that of the packaged file on the {test_images:,} images at the even positions of CIFAR-10's test set. It was
measured once, after the last epoch. Kernels are stored in float16. [NOTICE](../NOTICE) states the training data and their
terms. `scripts/weights.py` generates this page from the cards of the files; do not edit it by hand.

| model | parameters | multiply-adds | file | top-1 accuracy, % | epochs of the last run | hours of the last run |
|---|---:|---:|---:|---:|---:|---:|
"""
SECTION = """
## {model}

{note}

    {command}

![Loss and accuracy over the epochs](weights/{model}.{tag}.png)

| recipe | batch size | peak learning rate | weight decay | epochs | training accuracy in the last epoch, % | test accuracy, % |
|---|---:|---:|---:|---:|---:|---:|
| `{recipe}` | {batch_size} | {rate:g} | {weight_decay:g} | {epochs} | {train_accuracy:.2f} | {accuracy:.2f} |
"""


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("model", required=False)
@click.option("--data-path", type=click.Path(exists=True, dir_okay=False), help="CIFAR-10 as .npz; its test set is measured.")
@click.option("--command", help="Command of the training, for the card.")
@click.option("--note", default="", help="How the weights were trained, for the card.")
@click.option("--tag", default="cifar10", show_default=True, help="Name of the weights, after that of the model.")
def main(run, model, data_path, command, note, tag):
    """Package the weights of RUN (a folder of resnet-train) as those of the variant MODEL; then write docs/weights.md.

    Without arguments only the document is updated from the files in the package.

    \b
    Examples:
      scripts/weights.py runs/resnet20 resnet20 --data-path cifar10.npz --command "resnet-train --recipe cpu-budget …"
      scripts/weights.py
    """
    if run:
        if not (model and data_path and command):
            raise click.UsageError("RUN needs MODEL, --data-path and --command as well")
        package(run, model, tag, data_path, command, note)
    TARGET.write_text(document(), encoding="utf-8")
    click.echo(TARGET.relative_to(ROOT))


def package(run, name, tag, data_path, command, note):
    """Write the file, measure it as it will be loaded, and put the figure into its card."""
    import keras

    from keras_resnet import data
    from keras_resnet.training import Run, checkpoint
    from keras_resnet.training.logs import curves
    from keras_resnet.training.schedules import scaled_rate
    from keras_resnet.training.views import averaged_over_views

    rows, summary = checkpoint.read(run)[1]["rows"], json.loads((run / "summary.json").read_text())
    told = Run.load(run / "run.yaml")
    trained, source = keras.saving.load_model(run / "model.keras", compile=False), data.load("cifar10", data_path)
    target = Path(str(PACKAGED)) / f"{name}.{tag}.safetensors"
    target.parent.mkdir(exist_ok=True)
    facts = {
        "source": f"{OWN}/{name}.{tag}", "dataset": "CIFAR-10", "licence": "Apache-2.0", "command": command, "note": note,
        "recipe": told.recipe, "batch_size": told.batch_size, "rate": scaled_rate(told),
        "weight_decay": told.weight_decay, "epochs": summary["epochs"], "seed": summary["seed"],
        "hours": round(summary["seconds"] / 3600, 2), "train_accuracy": round(100 * summary["train_accuracy"], 2),
        "test_images": source.test.size,
        "curve": [[row["epoch"], round(row["loss"], 4), round(row["accuracy"], 4)] for row in rows],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder) / target.name
        write(trained, work, facts)
        again = kr.create_model(name, weights=work)

        def percent_right(model):
            found = model.predict(source.test.images, batch_size=250, verbose=0).argmax(-1)
            return round(100 * float((found == source.test.labels).mean()), 2)

        facts["accuracy"] = percent_right(again)
        if told.tta != "none":
            facts |= {"tta": told.tta, "accuracy_tta": percent_right(averaged_over_views(again, told.tta))}
        write(trained, work, facts)
        if (size := work.stat().st_size) > LIMIT:
            raise click.ClickException(f"{target.name} would have {size:,} bytes; packaged weights have at most {LIMIT:,}")
        os.replace(work, target)
    picture = TARGET.parent / "weights" / f"{name}.{tag}.png"
    picture.parent.mkdir(exist_ok=True)
    curves(rows, picture, f"{name} on CIFAR-10")
    click.echo(f"{target.name}: {size:,} bytes, {facts['accuracy']:.2f} % of {source.test.size:,} test images")


def write(model, target, facts):
    """The file with these facts in its card."""
    kr.set_card(model, weights=facts)
    kr.save_weights(model, target, dtype="float16")


def document():
    """The whole of docs/weights.md, from the cards of the packaged files."""
    table, sections, test_images = "", "", 0
    for (model, tag), path in sorted(packaged().items()):
        facts, info = open_weights(path).card.weights, kr.model_info(model)
        test_images = facts["test_images"]
        table += (
            f"| [`{model}`](#{model}) | {info.trainable:,} | {info.macs / 1e6:.1f} M | {Path(path).stat().st_size / 1e6:.2f} MB "
            f"| {facts['accuracy']:.2f} | {facts['epochs']} | {facts['hours']:.1f} |\n"
        )
        sections += SECTION.format(model=model, tag=tag, **facts)
        if "tta" in facts:
            sections += f"\nWith test-time augmentation (`--tta {facts['tta']}`), it is {facts['accuracy_tta']:.2f} %.\n"
    return HEAD.format(test_images=test_images) + table + sections


if __name__ == "__main__":
    sys.exit(main())
