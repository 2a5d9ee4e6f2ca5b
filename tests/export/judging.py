"""What the exporter makes of a drawn model: exported, run by plain onnxruntime, and compared with the untouched Keras model.

`python -m tests.export.judging` is a process that reads recipes from its standard input, one JSON object a line, and answers with
one line each. `judge_many` runs several of them, so that a crash of native code costs one model and is counted.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

RIGHT = "right"
REFUSED = "refused, with a true reason"
WRONG = "silently wrong"
UNUSABLE = "file that onnxruntime does not run"
FALSE_REFUSAL = "false refusal"
CRASH = "crash"
LEFTOVERS = "leftover files"
OTHER_BYTES = "other bytes the second time"
MOVED = "model changed"
NO_MODEL = "Keras itself fails"
FINE = (RIGHT, REFUSED, NO_MODEL)
LEAST_EXPORTED = 0.8
LIMIT = 600  # seconds for one model; Keras calls a recurrent layer with a cell step by step

TOLERANCE = {"float32": 2e-5, "float16": 2e-2}
# Where the plain bound is missed, the error may be this many times what rounding of the weights does to Keras' own outputs.
ROUNDING = 20
# What float16 has no form for, as the message says it, and why nothing else can be done. `test_judging.py` shows each reason.
NOT_IN_HALF = {
    "has no weights, which float16 would make smaller": "the model has no weights that float16 could make smaller",
    "they see numbers beyond 32752": "float16 was asked for, and has no such numbers",
}
UNEXPORTABLE: dict[str, str] = NOT_IN_HALF | {
    "contrast_limited_adaptive_histogram_equalization' cannot be traced as a TensorFlow graph of these sizes": (
        "Keras computes it from a height and a width that are known"
    ),
    "ConvLSTM layers only support static input shapes": "Keras builds no such layer with dynamic size",
    "'Erfinv'": "no such function in ONNX",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        kind: One of the constants above.
        detail: What happened, on one line.
        seconds: Time of the first export.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0


def judge(recipe: Any, twice: bool = True, savedmodel: bool = False) -> Outcome:
    """Export a recipe's model and compare.

    Args:
        recipe: `generator.Recipe`.
        twice: Whether to export a second time, for the bytes.
        savedmodel: Whether to export a SavedModel as well, without options.

    Returns:
        The outcome. A crash of native code ends the process instead.
    """
    from . import generator

    try:
        model = recipe.model()
        reference_model = _reference_model(recipe, model)
        batches = generator.feeds_of(recipe, reference_model or model)
        if not batches:
            return Outcome(NO_MODEL, "no finite outputs")
        expected = [generator.outputs_of(reference_model or model, feeds) for feeds in batches]
    except Exception as error:
        return Outcome(NO_MODEL, _line(error))
    print("exporting", flush=True)
    before = state(model)
    with tempfile.TemporaryDirectory() as folder:
        outcome, path = _export(recipe, model, Path(folder), "model.onnx", reference_model)
        if outcome.kind == RIGHT:
            wrong = compare(recipe, path, batches, expected, reference_model or model)
            outcome = dataclasses.replace(outcome, kind=WRONG, detail=wrong) if wrong else outcome
        if outcome.kind in FINE and state(model) != before:
            outcome = dataclasses.replace(outcome, kind=MOVED, detail="variables differ after the export")
        if outcome.kind == RIGHT and twice:
            second, other = _export(recipe, model, Path(folder), "second.onnx", reference_model)
            if second.kind != RIGHT:
                outcome = dataclasses.replace(outcome, kind=OTHER_BYTES, detail=f"second export: {second.detail}")
            elif _digest(path) != _digest(other):
                outcome = dataclasses.replace(outcome, kind=OTHER_BYTES, detail=_difference(path, other))
        if outcome.kind == RIGHT and savedmodel and (wrong := _savedmodel(recipe, model, Path(folder) / "saved")):
            outcome = dataclasses.replace(outcome, kind=WRONG, detail=f"SavedModel: {wrong}")
    return outcome


def _savedmodel(recipe: Any, model: Any, path: Path) -> str:
    """What is wrong with a SavedModel of a model, or an empty string."""
    import tensorflow as tf

    import resnet_export as rx

    from . import generator

    plain = dataclasses.replace(recipe, options={})
    try:
        rx.to_savedmodel(model, path)
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    names = list(served.structured_input_signature[1])
    ours = [re.sub(r"\W", "_", tensor.name, flags=re.ASCII) for tensor in model.inputs]
    others = [name for name in names if name not in ours]  # of an only input, or of one without a name in a rebuilt model
    ours = [name if name in names else others.pop(0) for name in ours]
    for feeds in generator.feeds_of(plain, model):
        found = served(**{name: tf.constant(value) for name, value in zip(ours, feeds, strict=True)})
        want = generator.outputs_of(model, feeds)
        got = list(found.values()) if len(found) == 1 else [found[name] for name in _output_names(model, found)]
        if wrong := _differs(plain, model, feeds, want, dict(enumerate(value.numpy() for value in got))):
            return wrong
    return ""


def _output_names(model: Any, found: dict) -> list[str]:
    """The outputs' names in the order of the model's outputs: keys of a dict, Keras' names, or numbers."""
    keys = sorted(model.output) if isinstance(model.output, dict) else list(model.output_names)
    return keys if set(keys) == set(found) else sorted(found)


def judge_stock(recipe: Any) -> Outcome:
    """The same of `model.export(format="onnx")`, without options and without the questions that only we answer."""
    from . import generator

    try:
        model = recipe.model()
        batches = generator.feeds_of(recipe, model)
        expected = [generator.outputs_of(model, feeds) for feeds in batches]
        if not batches:
            return Outcome(NO_MODEL, "no finite outputs")
    except Exception as error:
        return Outcome(NO_MODEL, _line(error))
    print("exporting", flush=True)
    plain = dataclasses.replace(recipe, options={})
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "stock.onnx", time.perf_counter()
        try:
            model.export(str(path), format="onnx", verbose=False)
        except Exception as error:
            return Outcome(CRASH, _line(error))
        seconds = time.perf_counter() - start
        wrong = compare(plain, path, batches, expected, model)
        kind = UNUSABLE if wrong.startswith("onnxruntime:") else WRONG
        return Outcome(kind if wrong else RIGHT, wrong, seconds)


def _reference_model(recipe: Any, model: Any) -> Any:
    """The untouched model with its size open, where that is what the export asks for; None where there is no such model."""
    from . import generator

    if not recipe.options.get("dynamic_size"):
        return model
    try:
        opened = recipe.model(size=generator.OPEN)
        for variable, value in zip(opened.variables, model.variables, strict=True):
            variable.assign(value)
    except Exception:
        return None
    feeds = generator.feeds_of(dataclasses.replace(recipe, options={}), model)[:1]
    for batch in feeds:
        for here, there in zip(generator.outputs_of(model, batch), generator.outputs_of(opened, batch), strict=True):
            if here.shape != there.shape or not np.allclose(here, there, 1e-3, 1e-4):
                return None
    return opened if generator.feeds_of(recipe, opened) else None


def _export(recipe: Any, model: Any, folder: Path, name: str, reference_model: Any) -> tuple[Outcome, Path]:
    import resnet_export as rx

    path, there, start = folder / name, set(os.listdir(folder)), time.perf_counter()
    outcome = Outcome(RIGHT)
    try:
        rx.to_onnx(model, path, **recipe.options)
    except rx.UsageError as error:
        # The target lies in a temporary folder here; any other name from there has no place in a message.
        outcome = _refusal(recipe, model, str(error).replace(str(path), name), reference_model)
    except rx.MismatchError as error:
        known = any(reason in str(error) for reason in NOT_IN_HALF)
        known = known or ("(float32) differs from the model" in str(error) and _overflows(recipe, model))
        outcome = Outcome(REFUSED if known else FALSE_REFUSAL, f"MismatchError: {_line(error)}")
    except Exception as error:
        outcome = Outcome(CRASH, f"{type(error).__name__}: {_line(error)}")
    outcome = dataclasses.replace(outcome, seconds=time.perf_counter() - start)
    made = set(os.listdir(folder)) - there
    if made - {name, f"{name}.data"} or (made and outcome.kind != RIGHT):
        outcome = dataclasses.replace(outcome, kind=LEFTOVERS, detail=f"{sorted(made)}; {outcome.detail}")
    return outcome, path


def _refusal(recipe: Any, model: Any, message: str, reference_model: Any) -> Outcome:
    """Whether a refusal is true, and says what it must: the layer and the reason, on one line without escapes and paths."""
    line = _line(message)
    if "\x1b" in message or tempfile.gettempdir() in message:
        return Outcome(FALSE_REFUSAL, f"unclear message: {line!r}")
    if any(layer.name in message for layer in model.layers) and not _predicts(recipe, reference_model):
        return Outcome(REFUSED, line)
    if any(reason in message for reason in UNEXPORTABLE):
        return Outcome(REFUSED, line)
    return Outcome(FALSE_REFUSAL, line)


def _in_float32(recipe: Any, model: Any, opened: bool = False) -> Any:
    """A mixed model as Keras builds it in float32, with the same weights."""
    from . import generator

    single = recipe.model(policy="float32", size=generator.OPEN if opened else None)
    for variable, weight in zip(single.variables, model.variables, strict=True):
        variable.assign(np.asarray(weight.value))
    return single


def _overflows(recipe: Any, model: Any) -> bool:
    """Whether a model in mixed float16 computes something else in float32, which is what a file computes in.

    A sum of squares of pixels that exceeds 65,504 is infinite, and what is divided by it is 0.
    """
    from . import generator

    if recipe.policy != "mixed_float16":
        return False
    single = _in_float32(recipe, model)
    own = generator.feeds_of(recipe, model)
    rng = np.random.default_rng(0)
    drawn = [
        [values.astype(value.dtype) for value, values in zip(own[0], batch, strict=True)]
        for batch in ([rng.integers(0, 256, value.shape) for value in own[0]], [rng.normal(size=value.shape) for value in own[0]])
    ]
    return any(
        not np.abs(half - full).max() <= _tolerance(recipe) * np.abs(half).max()  # one of them may be no number
        for feeds in (*own, *drawn)
        for half, full in zip(generator.outputs_of(model, feeds), generator.outputs_of(single, feeds), strict=True)
    )


def _predicts(recipe: Any, model: Any) -> bool:
    """Whether Keras itself can run a model as a graph, which is what a converter gets."""
    from . import generator

    if model is None:
        return False
    feeds = generator.feeds_of(recipe, model)[0]
    try:
        model.predict(feeds[0] if len(feeds) == 1 else feeds, verbose=0)
    except Exception:
        return False
    return True


def compare(recipe: Any, path: Path, batches: list, expected: list, model: Any) -> str:
    """What is wrong with a file, or an empty string. What onnxruntime's sigmoid alone does to it is no fault of the file."""
    import onnx

    wrong = _wrong(recipe, path, batches, expected, model)
    if not wrong or wrong.startswith("onnxruntime:") or all(node.op_type != "Sigmoid" for node in onnx.load(path).graph.node):
        return wrong
    exact = path.with_name("exact_sigmoid.onnx")
    onnx.save(with_exact_sigmoid(onnx.load(path)), exact)
    return _wrong(recipe, exact, batches, expected, model) and wrong


def with_exact_sigmoid(proto: Any) -> Any:
    """The file with exp(−softplus(−x)) in place of onnxruntime's sigmoid, whose error is 1e-7 however small the result."""
    import onnx

    nodes = []
    for node in proto.graph.node:
        if node.op_type != "Sigmoid":
            nodes.append(node)
            continue
        (x,), (y,) = node.input, node.output
        steps = [
            ("Neg", x, f"{y}/opposite"),
            ("Softplus", f"{y}/opposite", f"{y}/lost"),
            ("Neg", f"{y}/lost", f"{y}/log"),
            ("Exp", f"{y}/log", y),
        ]
        nodes += [onnx.helper.make_node(kind, [source], [output]) for kind, source, output in steps]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _wrong(recipe: Any, path: Path, batches: list, expected: list, model: Any) -> str:
    import onnxruntime as ort

    for optimise in (True, False):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            outputs = [value.name for value in session.get_outputs()]
            for feeds, want in zip(batches, expected, strict=True):
                got = dict(zip(outputs, session.run(None, _named(recipe, session, model, feeds)), strict=True))
                if wrong := _differs(recipe, model, feeds, want, got):
                    return f"{wrong} (optimised: {optimise}, batch {[value.shape for value in feeds]})"
            if recipe.options.get("resize") and (wrong := _resized(session, recipe, model)):
                return wrong
        except Exception as error:
            return f"onnxruntime: {_line(error)}"
    return ""


def _named(recipe: Any, session: Any, model: Any, feeds: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds by the names, and in the layout and dtypes, that the file has; Keras' names where the file has them."""
    inputs = session.get_inputs()
    names = [value.name for value in inputs]
    keras_names = [tensor.name for tensor in model.inputs]
    order = keras_names if set(names) == set(keras_names) else names
    types = {value.name: value.type.removeprefix("tensor(").removesuffix(")") for value in inputs}
    found = {}
    for name, value in zip(order, feeds, strict=True):
        if recipe.options.get("layout") == "nchw" and value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        found[name] = value.astype({"float": "float32", "double": "float64"}.get(types[name], types[name]))
    return found


def _differs(recipe: Any, model: Any, feeds: list, want: list[np.ndarray], got: dict[str, np.ndarray]) -> str:
    """What is wrong with a file's outputs, or an empty string."""
    got, bound = dict(got), max(1e-3, _tolerance(recipe))
    if recipe.options.get("top_k"):
        classes, best = got.pop("top_classes"), got.pop("top_probabilities")
        if not np.allclose(np.take_along_axis(want[0], classes.astype("int64"), -1), best, 0, bound):
            return "top_classes and top_probabilities do not belong to the model's probabilities"
        if not np.allclose(np.sort(want[0], axis=-1)[:, ::-1][:, : best.shape[-1]], best, 0, bound):
            return "top_probabilities are not the largest"
    if "logits" in (recipe.options.get("outputs") or ()):
        logits = got.pop("logits").astype("float64")
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = got.get("probabilities", want[0])
        if not np.allclose(exponentials / exponentials.sum(-1, keepdims=True), probabilities, 0, bound):
            return "softmax of `logits` is not what the model returns"
    if len(got) != len(want):
        return f"{len(got)} outputs ({', '.join(got)}), the model has {len(want)}"
    for position, (name, value) in enumerate(got.items()):
        reference = want[position]
        if value.shape != reference.shape:
            return f"`{name}` has the shape {list(value.shape)}, the model's {list(reference.shape)}"
        error = float(np.abs(value.astype("float64") - reference.astype("float64")).max(initial=0))
        scale = float(np.abs(reference.astype("float64")).max(initial=0.0))
        if error <= _tolerance(recipe) * scale or error <= ROUNDING * _rounding(recipe, model, feeds, position):
            continue
        if not _is_in_float32(recipe, model, feeds, position, value):
            return f"`{name}` is off by {error:.2g}, its largest value is {scale:.2g}"
    return ""


def _is_in_float32(recipe: Any, model: Any, feeds: list, position: int, value: np.ndarray) -> bool:
    """Whether a mixed model's file computes what Keras does in float32; 16 bits may decide a cast to whole numbers otherwise."""
    from . import generator

    if not recipe.policy.startswith("mixed"):
        return False
    want = generator.outputs_of(_in_float32(recipe, model, opened=recipe.options.get("dynamic_size")), feeds)[position]
    bound = TOLERANCE[recipe.options.get("precision", "float32")] * np.abs(want).max(initial=0)
    return want.shape == value.shape and bool(np.abs(value - want).max(initial=0) <= bound)


def _tolerance(recipe: Any) -> float:
    """Relative bound: a model that computes in 16 bits differs by that from its file, which computes in 32."""
    loosest = {"mixed_float16": 2e-2, "mixed_bfloat16": 1e-1}.get(recipe.policy, 0.0)
    return max(loosest, TOLERANCE[recipe.options.get("precision", "float32")])


def _rounding(recipe: Any, model: Any, feeds: list, position: int) -> float:
    """How far the model's own output moves when its weights and inputs are rounded otherwise: a second model has them so."""
    from . import generator

    rng, want, worst = np.random.default_rng(1), generator.outputs_of(model, feeds)[position], 0.0
    other = recipe.model(size=generator.OPEN if recipe.options.get("dynamic_size") else None)
    unit = {"mixed_float16": 5e-4, "mixed_bfloat16": 4e-3}.get(recipe.policy, 6e-4 if "precision" in recipe.options else 6e-8)
    for _ in range(3):
        for variable, value in zip(other.variables, model.variables, strict=True):
            if variable.dtype.startswith(("float", "bfloat")):
                variable.assign(np.array(value.value) * (1 + unit * rng.normal(size=value.shape)))
        moved = [value * (1 + unit * rng.normal(size=value.shape)) if value.dtype.kind == "f" else value for value in feeds]
        moved = [value.astype(feed.dtype) for value, feed in zip(moved, feeds, strict=True)]
        found = generator.outputs_of(other, moved)[position]
        worst = max(worst, float(np.abs(found.astype("float64") - want.astype("float64")).max(initial=0)))
    return worst


def _resized(session: Any, recipe: Any, model: Any) -> str:
    """An image of one colour has that colour in any size, so that no resizing is needed to know what the file must say."""
    from . import generator

    shape = tuple(model.inputs[0].shape)
    colours = np.random.default_rng(3).integers(0, 256, (2, 1, 1, shape[-1]))
    small, large = (np.broadcast_to(colours, (2, *size, shape[-1])) for size in (shape[1:3], (29, 37)))
    want = generator.outputs_of(model, [small.astype("float32")])
    almost = generator.outputs_of(model, [small.astype("float32") + np.random.default_rng(4).uniform(-1e-4, 1e-4, small.shape)])
    if not all(np.allclose(here, there, 1e-2, 1e-3) for here, there in zip(want, almost, strict=True)):
        return ""  # a model that jumps, as one that stretches contrast does where there is none
    got = session.run(None, _named(recipe, session, model, [large.astype("uint8")]))
    names = [value.name for value in session.get_outputs()]
    return _differs(recipe, model, [small.astype("float32")], want, dict(zip(names, got, strict=True)))


def state(model: Any) -> list[bytes]:
    """All variables, seeds and states of a model, bit for bit, and its configuration."""
    values = [np.array(variable.value).tobytes() for variable in model.variables]
    activations = [repr(getattr(layer, "activation", None)) for layer in model._flatten_layers()]
    return [*values, "|".join(activations).encode()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _difference(path: Path, other: Path) -> str:
    """Where two files first differ."""
    import onnx

    one, two = onnx.load(path), onnx.load(other)
    for name, get in {
        "metadata": lambda proto: [(entry.key, entry.value) for entry in proto.metadata_props],
        "node": lambda proto: [node.SerializeToString(deterministic=True) for node in proto.graph.node],
        "initialiser": lambda proto: [tensor.SerializeToString(deterministic=True) for tensor in proto.graph.initializer],
        "value info": lambda proto: [value.SerializeToString(deterministic=True) for value in proto.graph.value_info],
    }.items():
        for here, there in zip(get(one), get(two), strict=False):
            if here != there:
                return f"first difference: {name} {str(here)[:150]!r} became {str(there)[:150]!r}"
        if len(get(one)) != len(get(two)):
            return f"another number of {name}s"
    return "elsewhere"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:400]


# ----------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A recipe and its outcome; `stock` is that of Keras' own exporter where it was asked for."""

    number: int
    recipe: Any
    outcome: Outcome
    stock: Outcome | None = None


class _Worker:
    """One process that judges; started again when it dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, question: dict, limit: float = LIMIT) -> Outcome:
        if self.process is None or self.process.poll() is not None:
            environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_ENABLE_ONEDNN_OPTS": "1"}
            environment |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.export.judging"], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        process, exporting = self.process, False
        started, timer = time.monotonic(), threading.Timer(limit, process.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                if line.strip() == "exporting":
                    exporting = True
                elif line.startswith("outcome "):
                    return Outcome(**json.loads(line.removeprefix("outcome ")))
            code = process.wait()
            reason = f"stopped after {limit:.0f} s" if time.monotonic() - started >= limit else f"the process ended with {code}"
            return Outcome(CRASH if exporting else NO_MODEL, reason)
        finally:
            timer.cancel()

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


def judge_many(
    recipes: Iterable[tuple[int, Any]],
    processes: int = 2,
    stock: bool = False,
    twice: int = 1,
    savedmodel: int = 0,
) -> Iterator[Judgement]:
    """Judge recipes in processes of their own.

    Args:
        recipes: Pairs of a number and a `generator.Recipe`, or None to have it drawn from the number as a seed.
        processes: How many at a time.
        stock: Whether to ask Keras' own exporter too.
        twice: One in how many recipes is exported a second time, for the bytes; 0 is none.
        savedmodel: One in how many is exported as a SavedModel as well; 0 is none.

    Yields:
        One `Judgement` per recipe, as they come.
    """
    from concurrent.futures import ThreadPoolExecutor

    local, workers = threading.local(), []

    def one(pair: tuple[int, Any]) -> Judgement:
        if not hasattr(local, "worker"):
            local.worker = _Worker()
            workers.append(local.worker)
        number, recipe = pair
        chosen = {"twice": twice, "savedmodel": savedmodel}
        question = {"seed": number, "recipe": recipe and dataclasses.asdict(recipe)}
        question |= {name: bool(every) and number % every == 0 for name, every in chosen.items()}
        outcome = local.worker.ask(question)
        theirs = local.worker.ask(question | {"stock": True}) if stock else None
        return Judgement(number, recipe, outcome, theirs)

    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(one, recipes)
    for worker in workers:
        worker.close()


def failures(seeds: Iterable[int], **options: Any) -> list[str]:
    """What went wrong with the models of some seeds, one line each. See `judge_many` for the options.

    Too many models that are refused, or that Keras cannot run, are a failure too: then hardly anything was exported.
    """
    found = list(judge_many(((seed, None) for seed in seeds), processes=1, **options))
    lines = [f"seed {one.number}: {one.outcome.kind}: {one.outcome.detail}" for one in found if one.outcome.kind not in FINE]
    right = sum(one.outcome.kind == RIGHT for one in found)
    return lines + [f"only {right} of {len(found)} models were exported"] * (right < LEAST_EXPORTED * len(found))


def signature(outcome: Outcome) -> str:
    """What failures of one kind have in common: the detail without names and numbers."""
    return f"{outcome.kind}: {re.sub(r'[`{].*?[`}]|[0-9][0-9.e+-]*|/[^ ]*|functional_[^ ]*', '…', outcome.detail)[:70]}"


def smaller(recipe: Any) -> Iterator[Any]:
    """Recipes that have less than this one: a line, an option, an argument."""
    for option in recipe.options:
        yield dataclasses.replace(recipe, options={name: value for name, value in recipe.options.items() if name != option})
    if recipe.policy != "float32":
        yield dataclasses.replace(recipe, policy="float32")
    lines = recipe.lines
    for number in range(1, len(lines) - 1):
        yield dataclasses.replace(recipe, lines=(*lines[:number], *lines[number + 1 :]))
    for number, line in enumerate(lines):
        for shorter in _shorter(line):
            yield dataclasses.replace(recipe, lines=(*lines[:number], shorter, *lines[number + 1 :]))


def _shorter(line: str) -> Iterator[str]:
    """A line of source without one keyword, with `x` for one call, or with the value of one expression for the whole."""
    if line.startswith("outputs = ") and line != "outputs = x":
        yield "outputs = x"
    for position, node in enumerate(ast.walk(ast.parse(line))):
        tree = ast.parse(line)
        twin = list(ast.walk(tree))[position]
        if isinstance(node, ast.Call):
            for keyword in range(len(node.keywords)):
                changed = ast.parse(line)
                del list(ast.walk(changed))[position].keywords[keyword]
                yield ast.unparse(changed)
            for argument in range(len(node.args)):
                if isinstance(node.args[argument], ast.Call):
                    twin.args[argument] = ast.Name("x")
                    yield ast.unparse(tree)
                    tree = ast.parse(line)
                    twin = list(ast.walk(tree))[position]


def shrink(recipe: Any, outcome: Outcome, seconds: float = 300) -> Any:
    """The smallest recipe found that fails in the same way.

    Args:
        recipe: `generator.Recipe` that fails.
        outcome: How.
        seconds: When to stop.
    """
    worker, deadline = _Worker(), time.monotonic() + seconds

    def fails(candidate: Any) -> bool:
        question = {
            "seed": 0,
            "recipe": dataclasses.asdict(candidate),
            "twice": outcome.kind == OTHER_BYTES,
            "savedmodel": "SavedModel" in outcome.detail,
        }
        return signature(worker.ask(question)) == signature(outcome)

    progress = True
    while progress and time.monotonic() < deadline:
        progress = False
        for candidate in smaller(recipe):
            if time.monotonic() > deadline:
                break
            if fails(candidate):
                recipe, progress = candidate, True
                break
    worker.close()
    return recipe


def recipe_of(fields: dict) -> Any:
    """A recipe from what `dataclasses.asdict` made of it."""
    from . import generator

    return generator.Recipe(**fields | {"lines": tuple(fields["lines"]), "kinds": tuple(fields["kinds"])})


def main() -> None:
    """Answer questions from standard input until it ends."""
    warnings.simplefilter("ignore")
    from . import generator

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question = json.loads(line)
        sys.stdout = answers
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            recipe = recipe_of(question["recipe"]) if question["recipe"] else generator.recipe(question["seed"])
            outcome = judge_stock(recipe) if question.get("stock") else judge(recipe, question["twice"], question["savedmodel"])
        print("\noutcome " + json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
