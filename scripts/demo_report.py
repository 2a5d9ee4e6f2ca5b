"""The demo's report: one HTML file with its figures inside, to be opened without a network."""

import base64
import html
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BACKBONE, GROWN, CONTROL, WRONG = "#5b6472", "#1f6feb", "#d98c1f", "#c62828"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2128; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; }
.card { flex: 1 1 11rem; border: 1px solid #d0d7de; border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5rem; } .card span { color: #57606a; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
caption { text-align: left; color: #57606a; padding-bottom: .3rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #57606a; font-size: .92rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .7rem; }
.grid figure { margin: 0; text-align: center; border: 2px solid #d0d7de; border-radius: 6px; padding: .4rem; }
.grid figure.wrong { border-color: #c62828; } .grid img { width: 64px; image-rendering: pixelated; }
code { background: #f0f2f5; padding: .1rem .3rem; border-radius: 4px; }
"""


def write_report(path, seen, seconds):
    """Write the report, and its curves as `curves.png` next to it, and return a path that can be typed.

    Args:
        path: the HTML file.
        seen: what the demo's steps saw, see `demo.py`.
        seconds: how long the demo took.
    """
    sections = [
        _summary(seen, seconds),
        _curves(seen, Path(path).with_name("curves.png")),
        _drift(seen),
        _pictures(seen),
        _artefacts(seen),
        _next(),
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>A VGG grown by layers that do nothing</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>"
    )
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path.absolute()


def _summary(seen, seconds):
    identity, further = seen["identity"], seen["further"]
    train, test = seen["counts"]
    cards = [
        (f"{seen['before'][-1]:.2%}", "test accuracy of the small VGG-16"),
        (f"{identity.eager:g}", f"max |Δ| of the logits after growing by 26 layers; accuracy {seen['same']:.2%}"),
        (f"{further['grown'][-1]:.2%}", f"after {len(further['grown']) - 1} more epochs with the new layers"),
        (f"{further['VGG alone'][-1]:.2%}", "the VGG alone after the same further epochs"),
    ]
    body = "".join(f"<div class='card'><b>{value}</b><span>{text}</span></div>" for value, text in cards)
    return (
        "<h1>A trained VGG, 26 layers that do nothing, a verified ONNX file</h1>"
        f"<p>scikit-learn's handwritten digits, {train} images to train on and {test} to test on, "
        f"in {seconds:.0f} s on this machine. "
        "A residual block computes <i>x + F(x)</i>; here <i>F</i> starts at exactly zero, so the grown network "
        "<i>is</i> the trained one and moves away from it only where that lowers the loss. "
        f"This is one seed on little data: it shows that growth is exact, and the last two numbers may differ by chance.</p>"
        f"<div class='cards'>{body}</div>"
        "<table><caption>The identity, measured on 64 test images</caption>"
        "<tr><th>how the models were called</th><th>max |Δ|</th></tr>"
        f"<tr><td>eagerly, inference</td><td>{identity.eager:g}</td></tr><tr><td>graph mode (<code>predict</code>)</td>"
        f"<td>{identity.graph:g}</td></tr><tr><td>training mode</td><td>{identity.training:g}</td></tr></table>"
    )


def curves(seen):
    """Test accuracy per epoch: the whole training, and next to it what follows growth on an axis of its own."""
    figure, (whole, after) = plt.subplots(1, 2, figsize=(8.5, 3.6), width_ratios=(2, 3), layout="constrained")
    first, further = seen["before"], seen["further"]
    start = len(first) - 1
    epochs = range(start, start + len(further["grown"]))
    whole.plot(range(len(first)), _percent(first), color=BACKBONE, label="small VGG-16")
    for axis in (whole, after):
        axis.plot(epochs, _percent(further["VGG alone"]), color=CONTROL, label="the VGG trained further")
        axis.plot(epochs, _percent(further["grown"]), color=GROWN, label="with 26 more layers")
        axis.axvline(start, color="#999", lw=1, ls=":")
        axis.set(xlabel="epoch", ylabel="test accuracy, %")
    whole.set_ylim(0, 101)
    after.margins(y=0.2)  # room for the text above the lines
    after.annotate(
        "growth changes nothing here", (start, _percent(first)[-1]), xytext=(0.05, 0.92), textcoords="axes fraction",
        color="#57606a", fontsize=9, arrowprops={"arrowstyle": "->", "color": "#57606a", "shrinkB": 4, "relpos": (0, 0.5)},
    )  # fmt: skip
    after.xaxis.get_major_locator().set_params(integer=True)
    whole.legend(loc="lower right", framealpha=1, edgecolor="none", fontsize=8)
    return figure


def _curves(seen, picture):
    figure = curves(seen)
    figure.savefig(picture, dpi=150)
    caption = (
        "Test accuracy after each epoch: the whole training, and enlarged the part after growth. At the dotted line, both "
        "curves start from the same network."
    )
    return "<h2>Accuracy</h2>" + _figure(figure, caption)


def _drift(seen):
    blocks = list(seen["drift"])
    figure, axis = plt.subplots(figsize=(8.5, 3.8))
    positions = range(len(blocks))
    axis.bar(positions, [block.mean for block in blocks], color=GROWN, label="mean over images")
    axis.scatter(positions, [block.max for block in blocks], color=BACKBONE, s=14, zorder=3, label="largest of an image")
    axis.set_xticks(positions, [block.block.replace("_pool_grow", "\n+") for block in blocks], fontsize=8)
    axis.set(ylabel="‖F(x)‖ / ‖x‖", xlabel="block, from input to output")
    axis.legend(frameon=False)
    return "<h2>Drift from the identity</h2>" + _figure(
        figure,
        f"How far each new block has moved from the identity, on {seen['drift'].images} test images. "
        "All were exactly 0 when they were added.",
    )


def _pictures(seen):
    tiles = []
    for path, label, prediction in seen["pictures"]:
        best, share = prediction.labels[0], prediction.probabilities[0]
        wrong = "" if int(prediction.classes[0]) == label else " class='wrong'"
        image = base64.b64encode(Path(path).read_bytes()).decode()
        said = f"{html.escape(str(best))} ({share:.0%})" + (f", is {label}" if wrong else "")
        tiles.append(
            f"<figure{wrong}><img alt='digit {label}' src='data:image/png;base64,{image}'>"
            f"<figcaption>{said}</figcaption></figure>"
        )
    right = sum(int(p.classes[0]) == label for _, label, p in seen["pictures"])
    return (
        f"<h2>Image files, classified with onnxruntime</h2><p>{right} of {len(tiles)} right. "
        f"The ONNX file contains labels and preprocessing, so nothing else was needed.</p>"
        f"<div class='grid'>{''.join(tiles)}</div>"
    )


def _artefacts(seen):
    names = {"keras": "Keras (<code>.keras</code>)", "savedmodel": "SavedModel", "onnx": "ONNX, onnxruntime"}
    rows = []
    for key, name in names.items():
        result = seen["reports"].get(key)
        verdict = "the reference" if result is None else f"verified, largest relative error {result.report.worst():.1e}"
        one, many = seen["latencies"][key, 1], seen["latencies"][key, 32]
        rows.append(
            f"<tr><td>{name}</td><td>{_size(seen['files'][key]) / 1e6:.2f}</td>"
            f"<td>{one:.2f}</td><td>{many:.2f}</td><td>{verdict}</td></tr>"
        )
    again = seen["reports"]["again"]
    return (
        "<h2>Files</h2><table>"
        "<tr><th>file</th><th>MB</th><th>1 image, ms</th><th>32 images, ms</th><th>verification</th></tr>"
        f"{''.join(rows)}</table><p>The ONNX file was then read back and compared once more: "
        f"{len(again.comparisons)} comparisons with onnxruntime's optimisations on and off, "
        f"largest relative error {again.worst():.1e}, bound {again.tolerance:.0e}. "
        "Latencies are medians of 30 calls.</p>"
    )


def _next():
    commands = [
        "resnet-export predict demo/digits.onnx demo/images/*.png",
        "resnet-export onnx resnet50 resnet50.onnx",
    ]
    return "<h2>Next</h2><p>From the project's folder:</p>" + "".join(
        f"<p><code>.venv/bin/{command}</code></p>" for command in commands
    )


def _figure(figure, caption):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f"<img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _percent(values):
    return [100 * value for value in values]


def _size(path):
    path = Path(path)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
