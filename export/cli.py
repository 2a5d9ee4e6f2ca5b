"""`resnet-export`: each command parses, calls one function and prints."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from . import console as report
from .errors import ExportError, MismatchError
from .options import ExportOptions
from .serving.commands import batch_prediction_options, is_batch_prediction, predict_batches, register, scores_options

EXAMPLES = {
    "list": "resnet-export list 'resnet*'",
    "info": "resnet-export info resnet50",
    "onnx": "resnet-export onnx model.keras model.onnx --labels labels.txt",
    "savedmodel": "resnet-export savedmodel model.keras model/",
    "family": "resnet-export family model.keras model/ --budgets 1.0,0.75,0.5 --data photos/",
    "verify": "resnet-export verify model.onnx model.keras --samples photos/",
    "quantize": "resnet-export quantize model.onnx int8.onnx --int8 --calibration photos/",
    "bench": "resnet-export bench float32.onnx int8.onnx --batch 1,8 --threads 1,2 --figure bench.png",
    "inspect": "resnet-export inspect model.onnx --html model.html",
    "doctor": "resnet-export doctor --json",
    "predict": "resnet-export predict model.onnx cat.jpg dog.png --top 3",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="keras-resnet-export", prog_name="resnet-export")
def cli() -> None:
    """Export Keras models to ONNX and SavedModel, verify the files, and run or serve them.

    A file is written only if it computes what the model computes.

    \b
    Exit codes: 0 done and verified; 1 internal error; 2 wrong usage or unreadable input;
    3 the file does not match the model; 4 a device, library or extra is missing; 130 interrupted.
    """


def command(name: str) -> Callable[[Callable], click.Command]:
    """Register a subcommand with its example, `--json` and `--debug`."""

    def decorate(function: Callable) -> click.Command:
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n  {EXAMPLES[name]}"
        function = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks and TensorFlow's messages.")(
            function
        )
        function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
        return cli.command(name)(function)

    return decorate


SAMPLES = "Images to verify on in addition to random batches: a folder, .npz or .npy file."
SOURCE_OPTIONS = ("weights", "num_classes", "seed", "imports", "preprocessing", "unsafe_lambda")


def model_options(function: Callable) -> Callable:
    """Add the options that name a Keras model, `SOURCE_OPTIONS`."""
    options = (
        click.option(
            "--weights",
            help="Weights of a zoo model: a file, or a name such as torchvision/resnet50.IMAGENET1K_V2. Random by default.",
        ),
        click.option(
            "--num-classes",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of classes of a zoo model, by default that of the weights. Another number gets a new classifier.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the random weights."
        ),
        click.option(
            "--import", "imports", multiple=True, metavar="MODULE", help="Import a module that defines layers of MODEL first."
        ),
        click.option("--preprocessing", help="Add preprocessing of pixels to a model that has none: torch, caffe, tf, …"),
        click.option(
            "--unsafe-lambda", is_flag=True, help="Run the Python code in Lambda layers of MODEL. Only for files that you trust."
        ),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def declared(*names: str) -> Callable[[Callable], Callable]:
    """Add the flags of some fields of `ExportOptions`, as a decorator."""

    def decorate(function: Callable) -> Callable:
        fields = {field.name: field for field in dataclasses.fields(ExportOptions)}
        for name in reversed(names):
            settings = dict(fields[name].metadata)
            flag = settings.pop("flag", "--" + name.replace("_", "-"))
            if choices := settings.pop("choices", None):
                settings["type"] = click.Choice(choices)
            if (least := settings.pop("least", None)) is not None:
                settings["type"] = click.FloatRange(least)
            if isinstance(default := fields[name].default, bool):
                settings["is_flag"] = True
            elif default is not None:
                settings |= {"default": default, "show_default": True}
            function = click.option(flag, name, **settings)(function)
        return function

    return decorate


def output_options(function: Callable) -> Callable:
    """Add the arguments and options that `onnx` and `savedmodel` share."""
    options = (
        click.argument("model"),
        click.argument("out", required=False),
        click.option("-o", "--output", "out_option", help="The same as OUT."),
        declared("outputs", "output_kind", "layout"),
        click.option("--labels", help="Class names: a text file with one name per line, or a JSON list."),
        click.option("--samples", help=SAMPLES),
        click.option("--force", is_flag=True, help="Overwrite OUT."),
        click.option("--keep-failed", is_flag=True, help="Keep a file that failed verification as OUT.failed."),
        click.option("--report", "report_file", help="Write the figures of the verification to this JSON file, replacing it."),
    )
    return model_options(functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function))


def budget_options(function: Callable) -> Callable:
    """Add the options for how much int8 may change."""
    drop = click.option(
        "--max-drop",
        default=1.0,
        show_default=True,
        metavar="PERCENT",
        help="Largest share of images, in percent, that int8 may classify differently.",
    )
    error = click.option(
        "--max-error",
        default=0.1,
        show_default=True,
        metavar="SHARE",
        help="Largest error of int8 in outputs that score no classes, as a share of the largest value.",
    )
    return drop(error(function))


def int8_options(function: Callable) -> Callable:
    """Add the options of the commands that write one int8 file."""
    calibration = click.option("--calibration", help="Images from which int8 takes its ranges: a folder, .npz or .npy file.")
    target = click.option(
        "--target",
        type=click.Choice(["cpu", "gpu"]),
        default="cpu",
        show_default=True,
        help="Hardware on which the int8 file will run.",
    )
    return calibration(target(budget_options(function)))


@command("list")
@click.argument("pattern", default="*")
def list_command(pattern: str, as_json: bool) -> None:
    """List the models of the zoo that match PATTERN."""
    from .source import zoo_names

    names = zoo_names(pattern)
    report.show(names, "\n".join(names), as_json)


@command("info")
@click.argument("model")
@model_options
def info_command(model: str, as_json: bool, **source: Any) -> None:
    """Show the size, input and outputs of a Keras model.

    MODEL is a .keras or .h5 file, or the name of a zoo model.
    """
    from .source import describe

    described = describe(model, **source)
    report.show(described, report.table(described), as_json)


@command("onnx")
@output_options
@declared("opset", "input_dtype", "resize", "dynamic_size", "top_k", "prune_identity")
@click.option("--fp16", "precision", flag_value="float16", help="Convert to float16, with float32 inputs and outputs.")
@click.option("--int8", "precision", flag_value="int8", help="Quantise to static int8; needs --calibration.")
@int8_options
@click.option(
    "--external-data", is_flag=True, default=None, help="Store the weights in a second file, as is always done above 2 GB."
)
def onnx_command(**options: Any) -> None:
    """Export a Keras model to a verified ONNX file.

    MODEL is a .keras or .h5 file, or the name of a zoo model. OUT is the ONNX file to write.
    """
    from .exporters import to_onnx

    options["precision"] = options["precision"] or "float32"
    _export(to_onnx, options)


@command("savedmodel")
@output_options
def savedmodel_command(**options: Any) -> None:
    """Export a Keras model to a verified SavedModel folder.

    MODEL is a .keras or .h5 file, or the name of a zoo model. OUT is the folder to write.
    """
    from .exporters import to_savedmodel

    _export(to_savedmodel, options)


def _shares(context, parameter, value):
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"numbers separated by commas, got {value!r}") from None


@command("family")
@click.argument("model")
@click.argument("out")
@model_options
@click.option(
    "--budgets",
    callback=_shares,
    metavar="SHARES",
    help="Sizes of the members, as shares of the multiply-adds, comma-separated.  [default: 1.0,0.75,0.5]",
)
@click.option(
    "--latency-ms",
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Add the deepest member whose median latency on this machine is at most MS milliseconds.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Batch size for measuring latencies.")
@click.option("--threads", type=click.IntRange(1), help="Threads for measuring latencies; by default onnxruntime's choice.")
@click.option(
    "--data",
    help="Held-out images for choosing blocks, recalibrating and measuring: a folder (with a subfolder per class if they are "
    "labelled) or an .npz file.",
)
@click.option("--int8", is_flag=True, help="Also write every member in int8, calibrated on --data.")
@budget_options
@click.option("--labels", help="Class names: a text file with one name per line, or a JSON list.")
@declared("opset")
@click.option(
    "--search-images",
    type=click.IntRange(32),
    default=256,
    show_default=True,
    help="Number of images of --data that the search for blocks uses.",
)
@click.option("--force", is_flag=True, help="Replace OUT, the folder of an earlier family.")
def family_command(model: str, out: str, as_json: bool, **options: Any) -> None:
    """Export one network at several depths, as verified ONNX files.

    MODEL is a .keras or .h5 file, or the name of a zoo model. Shallower members leave out residual blocks. OUT is the
    folder to write, which `resnet-export serve OUT/family.json` serves.
    """
    from .elastic import members_text, to_family
    from .source import load_model, read_labels

    source = {key: options.pop(key) for key in SOURCE_OPTIONS}
    options["overwrite"] = options.pop("force")
    options["labels"] = read_labels(options["labels"]) if options["labels"] else None
    with report.steps(as_json) as progress:
        progress("load")
        loaded, notes = load_model(model, **source)
        report.notes(notes)
        family = to_family(loaded, out, progress=progress, **options)
    text = "\n".join([*(f"note: {note}" for note in family.notes), *report.columns(list(members_text(family)))])
    report.show({**family.to_json(), "folder": out}, text, as_json)


def _output_kinds(given):
    """`KIND` or `NAME=KIND …` as `ExportOptions.output_kind` has it."""
    pairs = [value.rpartition("=") for value in given]
    if len(pairs) > 1 and not all(name for name, _, _ in pairs):
        raise click.UsageError("Give --output-kind once, or as NAME=KIND for each output.")
    if not pairs:
        return None
    return {name: kind for name, _, kind in pairs} if pairs[0][0] else pairs[0][2]


def _export(exporter, options):
    from .source import load_model, read_labels

    as_json, report_file = options.pop("as_json"), options.pop("report_file")
    out, out_option = options.pop("out"), options.pop("out_option")
    if (out is None) == (out_option is None):
        raise click.UsageError("Missing output: give OUT, or -o OUT." if out is None else "Give OUT or -o, not both.")
    out, model = out_option if out is None else out, options.pop("model")
    read = report.files(model, *(options.get(name) for name in ("weights", "labels", "calibration", "samples")))
    report.check_apart(out, read)
    report.check_figure_files([report_file], [out, *read])
    source = {key: options.pop(key) for key in SOURCE_OPTIONS}
    options["overwrite"] = options.pop("force")
    options["output_kind"] = _output_kinds(options["output_kind"])
    options["labels"] = read_labels(options["labels"]) if options["labels"] else None
    with report.steps(as_json) as progress:
        progress("load")
        loaded, notes = load_model(model, **source)
        report.notes(notes)
        try:
            result = exporter(loaded, out, progress=progress, **options)
        except MismatchError as error:
            report.write_json(report_file, error.report)
            raise
    report.write_json(report_file, result.report)
    report.show(result.to_json(), report.export_text(result), as_json)


@command("verify")
@click.argument("file")
@click.argument("model")
@model_options
@click.option("--labels", help="Class names that FILE must contain, by default those of MODEL: a text file, or a JSON list.")
@click.option("--samples", help=SAMPLES)
@budget_options
@click.option("--report", "report_file", help="Write the figures to this JSON file, replacing it.")
def verify_command(
    file: str,
    model: str,
    labels: str | None,
    samples: str | None,
    max_drop: float,
    max_error: float,
    report_file: str | None,
    as_json: bool,
    **source: Any,
) -> None:
    """Compare an existing file with its Keras model.

    FILE is an ONNX file or a SavedModel folder. MODEL is a .keras or .h5 file, or the name of a zoo model.
    """
    from .exporters import require, verify
    from .source import load_model, read_labels

    report.check_figure_files([report_file], report.files(file, model, labels, samples, source.get("weights")))
    with report.steps(as_json) as progress:
        progress("load")
        loaded, notes = load_model(model, **source)
        report.notes(notes)
        progress("verify")
        labels = read_labels(labels) if labels else None
        verdict = verify(file, loaded, labels=labels, samples=samples, max_drop=max_drop, max_error=max_error)
    report.write_json(report_file, verdict)
    report.show(verdict.to_json(), report.verification_text(verdict), as_json)
    require(verdict)


@command("predict")
@click.argument("file", required=False)
@click.argument("images", nargs=-1)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Number of classes to show per image.")
@click.option("--device", default="auto", show_default=True, help="Device to run on: auto, cpu, cuda, tensorrt or openvino.")
@scores_options
@batch_prediction_options
def predict_command(
    file: str | None,
    images: tuple[str, ...],
    top: int,
    device: str,
    scores: str | None,
    output_kind: str | None,
    url: str | None,
    out: str | None,
    as_json: bool,
    **batch: Any,
) -> int | None:
    """Classify images with an ONNX file or a server.

    IMAGES are image files, folders, .txt files with a path per line, or .parquet tables. FILE is an ONNX file, which contains its
    labels and preprocessing; leave it out with --url.
    """
    if url and file:
        file, images = None, (file, *images)
    if not images:
        raise click.UsageError("Missing argument 'IMAGES...'.")
    if is_batch_prediction(images, url, out, batch["engine"]):
        return predict_batches(
            file, images, out, as_json, url=url, top=top, device=device, scores=scores, output_kind=output_kind, **batch
        )
    from .runtime.prediction import predict

    report.chosen([device])
    predictions = predict(file, list(images), top=top, device=device, scores=scores, output_kind=output_kind)
    report.show([prediction.to_json() for prediction in predictions], report.prediction_text(predictions), as_json)
    return None


register(cli)


@command("quantize")
@click.argument("file")
@click.argument("out")
@click.option("--fp16", is_flag=True, help="Convert to float16, with float32 inputs and outputs.")
@click.option("--int8", is_flag=True, help="Quantise to static int8, per channel; needs --calibration.")
@click.option("--samples", help="Images to compare on: a folder, .npz or .npy file.")
@int8_options
@scores_options
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--keep-failed", is_flag=True, help="Keep a file that failed verification as OUT.failed.")
def quantize_command(
    file: str,
    out: str,
    fp16: bool,
    int8: bool,
    force: bool,
    keep_failed: bool,
    samples: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a float32 ONNX file to float16 or int8.

    The new file OUT is written only if it agrees with FILE, within the bounds.
    """
    from .quantization.float16 import to_float16
    from .quantization.int8 import to_int8
    from .quantization.source import open_source
    from .quantization.table import side_by_side

    if fp16 == int8:
        raise click.UsageError("Give one of --fp16 and --int8.")
    if int8 and not options["calibration"]:
        raise click.UsageError("--int8 needs --calibration.")
    report.check_apart(out, report.files(file, options["calibration"], samples))
    with report.steps(as_json) as progress:
        progress("quantize")
        source = open_source(file)
        given: dict[str, Any] = {"samples": samples, "overwrite": force, "keep_failed": keep_failed}
        result = to_float16(source, out, **given) if fp16 else to_int8(source, out, **options, **given)
        progress("bench")
        result = side_by_side(source, result)
    report.show(result.to_json(), report.export_text(result), as_json)


def _numbers(context, parameter, value):
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"numbers separated by commas, got {value!r}") from None


@command("bench")
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=["auto"],
    show_default=True,
    help="Device to run on; may be given several times.",
)
@click.option("--batch", "batches", default="1", show_default=True, callback=_numbers, help="Batch sizes, comma-separated.")
@click.option(
    "--threads",
    default="0",
    show_default=True,
    callback=_numbers,
    help="Numbers of threads, comma-separated; 0 leaves the choice to onnxruntime.",
)
@click.option("--runs", default=31, show_default=True, help="Number of timed rounds.")
@click.option("--csv", "csv_file", help="Write the figures to this CSV file, replacing it.")
@click.option("--figure", "figure_file", help="Draw latency and throughput to this .png, .svg or .pdf file, replacing it.")
def bench_command(files: tuple[str, ...], csv_file: str | None, figure_file: str | None, as_json: bool, **options: Any) -> None:
    """Time ONNX files, which take turns.

    Prints latency percentiles and throughput for every file, device, batch size and number of threads.
    """
    from .runtime import figure
    from .runtime.benchmark import bench

    report.check_figure_files([csv_file, figure_file], files)
    if figure_file:
        figure.check(figure_file)
    report.chosen(options["devices"])
    with report.steps(as_json) as progress:
        progress("bench")
        found = bench(list(files), **options)
    timings = [timing.to_json() for timing in found]
    report.write_csv(csv_file, timings)
    if figure_file:
        figure.draw(found, figure_file)
    report.show(timings, report.rows_text(timings), as_json)


@command("inspect")
@click.argument("files", nargs=-1, required=True)
@click.option("--html", "html_file", help="Draw the blocks of the graph to this HTML file, replacing it. Only for a single FILE.")
def inspect_command(files: tuple[str, ...], html_file: str | None, as_json: bool) -> None:
    """Show inputs, outputs, size and metadata of ONNX files.

    Also counts the nodes, before and after onnxruntime has optimised the graph.
    """
    from .runtime.inspection import inspect, picture

    if html_file and len(files) > 1:
        raise click.UsageError("--html needs a single FILE.")
    report.check_figure_files([html_file], files)
    found = [inspect(file) for file in files]
    if html_file:
        report.write_text(html_file, picture(found[0]))
    data = [entry.to_json() for entry in found]
    text = "\n\n".join(map(report.inspection_text, data))
    report.show(data, text, as_json)


@command("doctor")
def doctor_command(as_json: bool) -> None:
    """Report which devices and libraries work.

    Shows versions, the devices that start, missing libraries and conflicting installations, and how to fix each problem.
    """
    from .runtime.doctor import diagnose

    diagnosis = diagnose()
    report.show(diagnosis.to_json(), report.diagnosis_text(diagnosis), as_json)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `resnet-export`; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    if debug:
        os.environ["RESNET_EXPORT_DEBUG"] = "1"
    try:
        return cli.main(arguments, prog_name="resnet-export", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except ExportError as error:
        if debug:
            raise
        return _fail(error, error.exit_code)
    except Exception as error:
        if debug:
            raise
        return _fail(f"internal error: {type(error).__name__}: {json.dumps(str(error))[1:-1]}; --debug shows where", 1)


def _fail(message, code):
    click.echo(f"resnet-export: {message}", err=True)
    return code
