"""What the experiments share: options, data, sub-runs that survive a kill, tables, statistics, figures."""

import contextlib
import csv
import dataclasses
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two to three times as fast where a network has few filters or small maps; no figure depends on it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def size(default, text, plan=False):
    """A size of an experiment, which becomes an option.

    Args:
        default: of the full run; its type is the option's, a tuple is written `A,B,…`.
        text: help.
        plan: it only says which sub-runs there are and changes none of them.
    """
    return field(default=default, metadata={"help": text, "plan": plan})


class Parts(click.ParamType):
    """Values between commas, of the type of an example."""

    name = "A,B,…"

    def __init__(self, example):
        self.kind = type(example)

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(",") if part)
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__}s between commas", param, ctx)


def experiment(choose, sizes, *options, images=True):
    """Make a command of `function(lab, **values of options)`; its docstring is the help, every size is an option too.

    Args:
        choose: `choose(flags) -> (name of the results, default sizes)`; `flags["quick"]` tells which are wanted.
        sizes: dataclass made of `size` fields; its defaults are shown in the help.
        *options: further click options.
        images: whether it takes images, and so `--data`.
    """

    def decorate(function):
        names = [item.name for item in dataclasses.fields(sizes)]

        def command(out, seeds, data=None, **flags):
            name, defaults = choose(flags)
            given = {key: flags.pop(key) for key in names}
            chosen = dataclasses.replace(defaults, **{key: value for key, value in given.items() if value is not None})
            quick = flags.pop("quick")
            source = "Gaussian" if not images else "digits" if quick and not data else "cifar10"
            lab = Lab(name, chosen, seeds or ((0,) if quick else (0, 1, 2)), source, out, data, quick)
            _guarded(lambda: function(lab, **flags))

        for item in reversed(dataclasses.fields(sizes)):
            kind = _kind(item.default)
            text = f"{item.metadata['help']}  [full: {written(item.default)}]"
            command = click.option(f"--{item.name.replace('_', '-')}", type=kind, help=text)(command)
        for option in reversed((*COMMON, *((DATA,) if images else ()), *options)):
            command = option(command)
        return click.command(help=function.__doc__, context_settings={"max_content_width": 120})(command)

    return decorate


def _kind(default):
    """The type of a size on the command line; sizes are positive."""
    if isinstance(default, tuple):
        return Parts(default[0])
    return {int: click.IntRange(1), float: click.FloatRange(0, min_open=True), str: str}[type(default)]


COMMON = (
    click.option("--quick", is_flag=True, help="Small sizes on scikit-learn's digits, to try the experiment in two minutes."),
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for the results. Finished parts are kept in its subfolder runs/, so that an interrupted run resumes. "
        "[docs/results, with --quick runs/quick]",
    ),
    click.option("--seeds", type=Parts(0), help="Seeds, e.g. 3,4,5.  [full: 0,1,2; quick: 0]"),
)


DATA = click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CIFAR-10 as .npz (x_train, y_train, x_test, y_test).  [read from ../shared/data]",
)


def written(value):
    """A size as a person writes it."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(written, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _guarded(function):
    """Run the experiment; errors of a training as one sentence with its exit code."""
    from resnet_export.source import quiet_start

    with quiet_start():
        from keras_resnet.training import TrainingError

    try:
        function()
    except TrainingError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(130)


@contextlib.contextmanager
def sentences():
    """Errors of the package about a size or a file are sentences for the user: make them errors of the command."""
    from keras_resnet.training import TrainingError

    try:
        yield
    except (ValueError, OSError) as error:
        raise TrainingError(str(error)) from error


@dataclass(frozen=True)
class Cell:
    """A sub-run, the unit of what is skipped when it is done.

    Args:
        key: `{column: value}` that names it in the table.
        function: `function(folder) -> rows`; goes on by itself from what it left in the folder.
        cost: relative duration, for the time left.
        keep: names of files to keep when it is done.
    """

    key: dict
    function: object
    cost: float = 1.0
    keep: tuple = ()


class Lab:
    """One call of an experiment: its sizes, its data, its folder.

    Args:
        name: of the results: `NAME.csv`, `NAME.json`, `NAME*.png`.
        sizes: dataclass made of `size` fields.
        seeds: whole numbers.
        data_name: `"cifar10"`, `"digits"`, or another word for what is made without images.
        out: folder; None for the default.
        data: path of CIFAR-10 as `.npz`; None for the default.
        quick: whether it is the small run.
    """

    def __init__(self, name, sizes, seeds, data_name, out=None, data=None, quick=False):
        self.name, self.sizes, self.seeds, self.quick = name, sizes, tuple(seeds), quick
        self.data_name, self.data = data_name, data
        self.out = out or (ROOT / "runs" / "quick" if quick else RESULTS)
        self.seconds, self._source = 0.0, None

    # ------------------------------------------------------------ data

    def source(self):
        """The images, `sizes.images` of them to train on and `sizes.test_images` to test on."""
        if self._source is None:
            full = _digits() if self.data_name == "digits" else _cifar10(self.data)
            train, test = (
                split.take(np.arange(min(split.size, count)))
                for split, count in ((full.train, self.sizes.images), (full.test, self.sizes.test_images))
            )
            self._source = dataclasses.replace(full, train=train, test=test)
        return self._source

    def create(self, name, seed, **fields):
        """A model of the zoo (by name or config, with other fields) for the images, with random weights of a seed."""
        import keras

        import keras_resnet as kr

        source = self.source()
        shape = (*source.image_size, source.train.channels)
        keras.utils.set_random_seed(seed)
        with sentences():
            return kr.create_model(
                name, num_classes=len(source.classes), input_shape=shape, preprocessing=source.preprocessing, **fields
            )  # fmt: skip

    @staticmethod
    def grow(model, after, **options):
        """`keras_resnet.grow`, but what is wrong with a size is an error of the command."""
        import keras_resnet as kr

        with sentences():
            return kr.grow(model, after, **options)

    # ------------------------------------------------------------ sub-runs

    def folder(self, key):
        """Where a sub-run lives: the same key with other sizes or other data is another sub-run."""
        mark = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:10]
        return self.out / "runs" / self.name / mark / "-".join(str(value) for value in key.values())

    def settings(self):
        """The sizes that change a sub-run, and the data."""
        sizes = {f.name: getattr(self.sizes, f.name) for f in dataclasses.fields(self.sizes) if not f.metadata["plan"]}
        return {**sizes, "data": str(self.data.resolve()) if self.data else self.data_name}

    def run(self, cells):
        """Run what is not done yet; the rows of all cells, with their keys in front, in the order of the cells."""
        rows, started, spent = [], time.perf_counter(), 0.0
        left = sum(cell.cost for cell in cells if not self.is_done(cell.key))
        for number, cell in enumerate(cells, 1):
            path = self.folder(cell.key) / "rows.json"
            if not self.is_done(cell.key):
                elapsed = time.perf_counter() - started
                wait = f", about {_duration(elapsed / spent * left)} left" if spent else ""
                click.echo(f"[{number} of {len(cells)}] {' '.join(map(str, cell.key.values()))}{wait}", err=True)
                self._do(cell, path)
                spent, left = spent + cell.cost, left - cell.cost
            held = json.loads(path.read_text(encoding="utf-8"))
            self.seconds += held["seconds"]
            rows += [{**cell.key, **row} for row in held["rows"]]
        return rows

    def is_done(self, key):
        """Whether a sub-run is done."""
        return (self.folder(key) / "rows.json").exists()

    def rows_of(self, key):
        """The rows of a sub-run that is done."""
        return json.loads((self.folder(key) / "rows.json").read_text(encoding="utf-8"))["rows"]

    def _do(self, cell, path):
        import keras

        path.parent.mkdir(parents=True, exist_ok=True)
        clock = path.with_name("seconds.txt")
        before = float(clock.read_text()) if clock.exists() else 0.0
        began = time.perf_counter()
        try:
            rows = cell.function(path.parent)
        finally:
            seconds = before + time.perf_counter() - began
            clock.write_text(str(seconds))
            keras.backend.clear_session()
            gc.collect()
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"seconds": round(seconds, 1), "rows": rows}), encoding="utf-8")
        os.replace(partial, path)
        for other in path.parent.iterdir():
            if other.name not in ("rows.json", *cell.keep):
                shutil.rmtree(other) if other.is_dir() else other.unlink()

    def train(self, folder, model, source=None, may_diverge=False, **run):
        """Train a model in the folder of a cell; a row per epoch.

        Args:
            folder: of the cell.
            model: see `keras_resnet.training.fit`.
            source: other data than the experiment's.
            may_diverge: a loss that is not finite any more is a result, and the last row then has `diverged`.
            **run: of `fit`.

        Raises:
            TrainingError: see `fit`.
        """
        from keras_resnet.training import Diverged, fit

        if self.data_name == "digits":
            run |= {"flip": False, "crop_padding": 0}
        try:
            history = fit(model, source or self.source(), out=folder, validate="test", **run).history
        except Diverged:
            if not may_diverge:
                raise
            history = [*read_csv(folder / "log.csv"), None]
        return [_epoch(row) if row else {"epoch": number, "diverged": 1} for number, row in enumerate(history, 1)]

    # ------------------------------------------------------------ results

    def write(self, rows, **more):
        """Write `NAME.csv` and `NAME.json` (sizes, seeds, data, versions, duration), and further tables `NAME_KEY.csv`."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_csv(rows, self.out / f"{self.name}.csv")
        for key, table in more.items():
            write_csv(table, self.out / f"{self.name}_{key}.csv")
        versions = {package: importlib.metadata.version(package) for package in ("tensorflow", "keras")}
        about = {
            **dataclasses.asdict(self.sizes), "seeds": self.seeds, "data": self.data_name, "quick": self.quick, **versions,
            "minutes": round(self.seconds / 60, 1),
        }  # fmt: skip
        (self.out / f"{self.name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def publish(self, module):
        """Draw the figures of an experiment from its tables; say where the results are; refresh the page."""
        for path in draw(self.name, module, self.out):
            click.echo(path, err=True)
        results = Results.read(self.name, self.out)
        for text in module.facts(results).values():
            click.echo(f"\n{text}")
        if self.out.resolve() == RESULTS.resolve():
            import page

            page.write()


def _epoch(row):
    """A row of a training's log as the tables have it."""
    return {
        "epoch": row["epoch"], "step": row["step"], "train_loss": row["loss"], "train_error": round(1 - row["accuracy"], 6),
        "test_loss": row["val_loss"], "test_error": round(1 - row["val_accuracy"], 6),
    }  # fmt: skip


def _duration(seconds):
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {int(seconds % 60):02d} s"


def _digits():
    """scikit-learn's digits, enlarged to 32 pixels: a VGG takes none below."""
    import keras_resnet.data as datasets

    source = datasets.load("digits")
    train, test = (
        dataclasses.replace(split, images=split.images.repeat(4, axis=1).repeat(4, axis=2))
        for split in (source.train, source.test)
    )
    return dataclasses.replace(source, train=train, test=test, image_size=(32, 32))


def _cifar10(path):
    import keras_resnet.data as datasets
    from keras_resnet.data.sources import CIFAR10_CLASSES
    from keras_resnet.training import TrainingError

    if path is not None:
        with sentences():
            return datasets.load("cifar10", str(path))
    reader = SHARED / "cifar10.py"
    if not reader.exists():
        raise TrainingError(f"there is no CIFAR-10 at {SHARED}; give --data FILE.npz, or --quick")
    spec = importlib.util.spec_from_file_location("cifar10", reader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, test = (
        datasets.Images(images, labels.astype("int64")) for images, labels in (module.load("train"), module.load("test_even"))
    )
    return datasets.Source("cifar10", train, test, CIFAR10_CLASSES, (32, 32), "cifar10")


def progress(items, label):
    """A bar on a terminal, nothing elsewhere; a context that gives the items."""
    return click.progressbar(items, label=label, file=sys.stderr, hidden=not sys.stderr.isatty())


# ---------------------------------------------------------------- tables


def write_csv(rows, path):
    """Write rows, which are dicts and may have different columns, to a file next to the target, then rename it."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    partial = path.with_name(f".{path.name}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def read_csv(path):
    """Rows of a table; numbers as numbers, empty fields left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(value) for key, value in row.items() if value != ""} for row in csv.DictReader(file)]


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class Results:
    """The tables of an experiment, read back: figures and page are made of these alone.

    Args:
        rows: of `NAME.csv`.
        about: `NAME.json`.
        more: rows of `NAME_KEY.csv` by KEY.
    """

    rows: list
    about: dict
    more: dict

    @classmethod
    def read(cls, name, folder):
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        more = {path.stem.removeprefix(f"{name}_"): read_csv(path) for path in sorted(folder.glob(f"{name}_*.csv"))}
        return cls(read_csv(folder / f"{name}.csv"), about, more)


def pick(rows, **wanted):
    """Rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def mean_and_spread(values):
    """`(mean, standard deviation over the seeds or None for a single one)`."""
    values = np.asarray(values, "float64")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def plus_minus(values, form=".1f", factor=1.0):
    """`"12.3 ± 0.4"`, or without a spread where there is one value."""
    mean, spread = mean_and_spread(np.asarray(values, "float64") * factor)
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def exceeds_spread(differences):
    """Whether the mean of differences, one for each seed, is further from 0 than their deviation; None of a single one."""
    mean, spread = mean_and_spread(differences)
    return None if spread is None else abs(mean) > spread


def difference(values, form="+.1f"):
    """Differences in percentage points, in words."""
    verdict = {None: "one seed", True: "more than the spread", False: "within the spread"}[exceeds_spread(values)]
    return f"{plus_minus(values, form)} percentage points ({verdict})"


def markdown(header, rows):
    """A Markdown table; all columns but the first to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---------------------------------------------------------------- figures

# Colours that remain apart for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw(name, module, folder):
    """Make the figures of an experiment from its tables; the paths."""
    paths = []
    for key, figure in module.figures(Results.read(name, folder)).items():
        paths.append(folder / f"{name}{f'_{key}' if key else ''}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight", metadata={"Software": None})
    return paths


def panels(rows, columns, width=4.2, height=3.4, **kwargs):
    """`(figure, axes)` without spines above and right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def band(axis, rows, x, y, factor=1.0, floor=None, bars=False, **style):
    """A line through the means over seeds, with a band from the smallest to the largest value.

    Args:
        axis: of matplotlib.
        rows: of a table; those without `y` are left out.
        x: column.
        y: column.
        factor: on y.
        floor: for a logarithmic axis: smaller values are drawn there, and the mean is the geometric one.
        bars: draw bars instead of a band; for places of which some have a single seed.
        **style: of the line.
    """
    values = {}
    for row in rows:
        if y in row:
            values.setdefault(row[x], []).append(row[y] * factor)
    places = sorted(values)
    table = [np.asarray(values[place]) for place in places]
    if floor is not None:
        table = [np.maximum(column, floor) for column in table]
    centre = [column.mean() if floor is None else np.exp(np.log(column).mean()) for column in table]
    (line,) = axis.plot(places, centre, **style)
    if max((len(column) for column in table), default=0) > 1:
        low, high = [column.min() for column in table], [column.max() for column in table]
        if bars:
            axis.vlines(places, low, high, color=line.get_color(), lw=6, alpha=0.3)
        else:
            axis.fill_between(places, low, high, color=line.get_color(), alpha=0.18, lw=0)
    return line
