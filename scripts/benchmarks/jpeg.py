"""`scripts/benchmark.py jpeg`: where the time of the image route goes, and what decoding at reduced size would change.

Pillow's draft mode has libjpeg decode a JPEG at 1/2, 1/4 or 1/8 of its size. It is faster for large pictures, but the pixels
differ, so that the answers may. The server does not use it; this says what it would gain and cost. Times are those of the
processor, so that other work on the machine does not change them.
"""

import io
import statistics
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

# A reduced picture keeps at least this multiple of the size that the model wants.
MARGIN = 2


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.argument("photos", type=click.Path(exists=True, file_okay=False))
@click.option("--sizes", multiple=True, type=int, default=(500, 1500, 4000), show_default=True, help="Longer side, in pixels.")
@click.option("--samples", default=40, show_default=True, help="JPEG files per size, crops of the photos.")
def jpeg(model, photos, sizes, samples):
    """Time decoding, resizing and the model on JPEGs made from a folder of PHOTOS; MODEL is an ONNX file with a card."""
    from resnet_export.runtime.prediction import image_input, scores_output
    from resnet_export.runtime.sessions import session

    opened = session(model, "cpu", threads=1)
    spec, ranking = image_input(opened), scores_output(opened)
    click.echo(
        f"{'longer side':>11} {'draft':>6} {'decode':>9} {'resize':>9} {'model':>9} {'route':>9} ms   top-1 as without draft"
    )
    for size in sizes:
        files = _jpegs(Path(photos), size, samples)
        reference = None
        for draft in (False, True):
            stages, classes = zip(*(_classify(file, opened, spec, ranking.output, draft) for file in files), strict=True)
            decode, resize, run = (1000 * statistics.median(stage) for stage in zip(*stages, strict=True))
            reference = classes if reference is None else reference
            agreement = np.mean(np.array(classes) == np.array(reference))
            figures = f"{decode:9.2f} {resize:9.2f} {run:9.2f} {decode + resize + run:9.2f}"
            click.echo(f"{size:11} {'yes' if draft else 'no':>6} {figures}      {agreement:.1%} of {len(files)}")


def _jpegs(folder, size, samples):
    """JPEG files of one size: crops of the photos, brought to it."""
    random, photos, files = np.random.default_rng(0), [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            photos.append(Image.open(path).convert("RGB"))
    if not photos:
        raise click.UsageError(f"{folder} holds no .jpg or .png files")
    for number in range(samples):
        photo = photos[number % len(photos)]
        width, height = (int(side * random.uniform(0.5, 1)) for side in photo.size)
        left, top = (int(random.uniform(0, have - want)) for have, want in zip(photo.size, (width, height), strict=True))
        scale = size / max(width, height)
        crop = photo.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.LANCZOS, (left, top, left + width, top + height)
        )
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _classify(file, opened, spec, output, draft):
    """`((seconds to decode, to resize and to run the model), class)` of one file."""
    from resnet_export.runtime import images
    from resnet_export.runtime.prediction import stacked

    preprocessing = opened.card.get("preprocessing") or {}
    height, width = preprocessing.get("size") or spec.shape[1:3]
    started = time.process_time()
    if draft:
        picture = Image.open(io.BytesIO(file))
        wanted = MARGIN * max(height, width, preprocessing.get("resize") or 0)
        picture.draft("RGB", (wanted, wanted))
        pixels = np.asarray(picture)
    else:
        pixels = images.decode(file)
    decoded = time.process_time()
    fitted = stacked([images.fit(pixels, preprocessing, (height, width))], spec)
    resized = time.process_time()
    scores = opened.run({spec.name: fitted})[output]
    return (decoded - started, resized - decoded, time.process_time() - resized), int(scores[0].argmax())
