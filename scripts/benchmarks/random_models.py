"""`scripts/benchmark.py random_models`: how many of a few hundred random Keras models come out right, next to stock Keras."""

import json
import sys
from collections import Counter
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]


@click.command()
@click.option("--first", default=0, show_default=True, help="First seed.")
@click.option("--models", default=60, show_default=True, help="Number of models.")
@click.option("--processes", default=2, show_default=True, help="Models checked at the same time.")
@click.option("--stock/--no-stock", default=True, show_default=True, help="Also export each with `model.export(format='onnx')`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def random_models(first: int, models: int, processes: int, stock: bool, as_json: bool) -> None:
    """Export random models (tests/export/generator.py) and check every file with plain onnxruntime against its model.

    The options of an export (layout, opset, dynamic size, uint8 images, float16 …) are random too, except for stock Keras.
    Failures are printed with the seed, from which the model can be built again.

    Example: scripts/benchmark.py random_models --models 200
    """
    sys.path.insert(0, str(ROOT))
    from tests.export import judging

    ours, theirs = Counter(), Counter()
    for one in judging.judge_many(((seed, None) for seed in range(first, first + models)), processes, stock=stock):
        ours[one.outcome.kind] += 1
        if one.stock is not None:
            theirs[one.stock.kind] += 1
        if one.outcome.kind not in judging.FINE:
            click.echo(f"seed {one.number}: {one.outcome.kind}: {one.outcome.detail[:200]}", err=True)
    if as_json:
        click.echo(json.dumps({"ours": ours, "stock": theirs}))
        return
    kinds = sorted({*ours, *theirs}, key=lambda kind: -ours[kind])
    click.echo("\n".join(f"{kind:40} {ours[kind]:4} ours {theirs[kind]:4} stock Keras" for kind in kinds))
