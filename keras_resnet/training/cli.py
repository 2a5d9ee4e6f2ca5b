"""The command `resnet-train`: flags from the options of a run, grouped help, processes on this machine for a trial."""

import dataclasses
import difflib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..models.loading import ModelFileError, import_modules
from .faults import WorkerLost
from .options import TrainingError, kinds_of
from .recipes import RECIPES
from .run import ELSEWHERE, GROUPS, OPTIONS, Run
from .strategies import is_chief, tf_config
from .zoo import train

# What a first run needs; the help begins with these.
FIRST = ("data", "model", "recipe", "epochs", "out")
RECIPE_HELP = "Set of defaults with a name; --recipes lists them.  [default: finetune for a pretrained model, else none]"
OUT_HELP = "Folder for the checkpoint, logs and model; the same command resumes there.  [default: runs/MODEL-DATA]"
# Options that have a flag of their own.
OTHERWISE = ("model_options", "growth")


class Option(click.Option):
    """A flag that belongs to a group of the help."""

    def __init__(self, *args: Any, group: str = "Running", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = "Start with these" if self.name in FIRST else group


class Command(click.Command):
    """A command whose help sorts its flags by group, the most important first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse flags; an unknown one gets a hint only where it resembles one, or is Keras' name for it."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            found = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, [*OPTIONS, "grow"], 1, 0.8)
            # The constructor would keep only hints that resemble the flag.
            error.possibilities = [f"--{known.replace('_', '-')}" for known in found]  # type: ignore[misc]
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags, group by group."""
        groups: dict[str, list] = {"Start with these": [], **{kind.__doc__: [] for kind in GROUPS.values()}, "Running": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups[getattr(parameter, "group", "Running")].append((parameter.name, record))
        for title, found in groups.items():
            if found:
                order = sorted(found, key=lambda pair: FIRST.index(pair[0])) if title == "Start with these" else found
                with formatter.section(title):
                    formatter.write_dl([record for _, record in order])


def options_of_run(command: Callable) -> Callable:
    """Add a flag for every option of a run."""
    for name, item in reversed(OPTIONS.items()):
        if name not in OTHERWISE:
            command = _flag(name, item)(command)
    return command


def _flag(name: str, item: dataclasses.Field) -> Callable:
    group = next(kind.__doc__ for kind in GROUPS.values() if name in kind.__dataclass_fields__)
    flag, default, told = "--" + name.replace("_", "-"), item.default, item.metadata
    shown: dict[str, Any] = {"default": None, "group": group, "cls": Option, "help": _help(told["help"], default)}
    if isinstance(default, bool) or name == "sync_batch_norm":
        return click.option(f"{flag}/--no-{flag[2:]}", name, **shown)
    if isinstance(default, tuple):
        return click.option(flag, name, metavar="A,B,…", **shown)
    kinds = kinds_of(item)
    if told["choices"] and float not in kinds:
        return click.option(flag, name, type=click.Choice(told["choices"]), **shown)
    named = [kind for kind in (int, float) if kind in kinds and str not in kinds]
    return click.option(flag, name, type=named[0] if named else str, **shown)


def _help(text: str, default: Any) -> str:
    if default is None or default == ():
        return text
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{text}  [default: {default}]"


@click.command(cls=Command, context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]})
@click.argument("description", required=False, type=click.Path(dir_okay=False))
@click.option("--recipe", cls=Option, help=RECIPE_HELP)
@click.option("--out", cls=Option, type=click.Path(file_okay=False), help=OUT_HELP)
@options_of_run
@click.option("--set", "model_options", cls=Option, group="Model", multiple=True, metavar="KEY=VALUE",
              help="Further argument of create_model, e.g. gate=zero_gamma.")  # fmt: skip
@click.option("--grow", "growth", cls=Option, group="Growth and fine-tuning", multiple=True, metavar="EPOCH:AFTER:BLOCKS",
              help="Before this epoch (counted from 0), add this number of residual blocks after each of these layers, e.g. "
              "5:*_pool:1.")  # fmt: skip
@click.option("--import", "imports", cls=Option, group="Model", multiple=True, metavar="MODULE",
              help="Import a module that defines layers of a model file first.")  # fmt: skip
@click.option("--unsafe-lambda", cls=Option, group="Model", is_flag=True,
              help="Run the Python code in Lambda layers of a model file. Only for files that you trust.")  # fmt: skip
@click.option("--local-workers", cls=Option, group="Devices and machines", type=click.IntRange(2),
              metavar="N", help="Start N processes on this machine's CPU, to try out a run on several machines.")  # fmt: skip
@click.option("--recipes", is_flag=True, help="List the recipes and stop.")
@click.option("--quiet", is_flag=True, help="Print the summary only.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(
    description: str | None,
    recipe: str | None,
    out: str | None,
    model_options: tuple[str, ...],
    growth: tuple[str, ...],
    imports: tuple[str, ...],
    unsafe_lambda: bool,
    local_workers: int | None,
    recipes: bool,
    quiet: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Train an image classifier.

    DESCRIPTION is a YAML file of options, such as the run.yaml of an earlier run. Options of the command override it.

    \b
    Examples:
      resnet-train --data photos/ --model resnet50 --weights torchvision/resnet50.IMAGENET1K_V2
      resnet-train --data cifar10 --model resnet20 --recipe cpu-budget --out runs/resnet20
      resnet-train --data digits --epochs 3 --local-workers 2
      resnet-train runs/resnet20/run.yaml --seed 1 --out runs/resnet20-seed1

    The last line on standard output is the summary as JSON.

    \b
    Exit codes: 0 done; 1 the loss is not finite, or a worker was lost; 2 wrong usage or unreadable data;
    4 a device is missing; 130 interrupted; 143 saved and stopped by SIGTERM.
    """
    if recipes:
        for name, told in RECIPES.items():
            click.echo(f"{name:16} {told['source']}")
        return
    run = None
    try:
        changes = _changes(flags, model_options, growth)
        if recipe is not None:
            changes["recipe"] = recipe
        run = Run.load(description, **changes) if description else Run.of(**changes)
        out = out or f"runs/{Path(run.model).stem}-{Path(run.data).stem}"
        if local_workers and run.workers:
            raise TrainingError("--local-workers starts processes of its own; leave out --workers")
        if local_workers:
            sys.exit(_spawn(local_workers))
        import_modules(imports)
        if unsafe_lambda:
            click.echo(f"Code in Lambda layers of {run.model} may run in this process", err=True)
        result = train(run, out, quiet=quiet, unsafe_lambda=unsafe_lambda)
    except ModelFileError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(TrainingError.exit_code)
    except TrainingError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        if _waits(error, run):
            click.echo("Waiting for the other workers", err=True)
            os.execv(sys.executable, [sys.executable, *_command()])
        if "TF_CONFIG" in os.environ:
            # The others may still be fetching what was last summed up, and would take this process for lost.
            time.sleep(1)
        # After a worker is lost, threads of the cluster would keep the process alive.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command resumes from the last checkpoint", err=True)
        sys.exit(130)
    if is_chief():
        click.echo(json.dumps(result.summary))


def _waits(error: TrainingError, run: Run | None) -> bool:
    """Whether a worker that lost another restarts and waits for it."""
    return isinstance(error, WorkerLost) and run is not None and run.lost_worker == "wait"


def _changes(flags: dict[str, Any], model_options: tuple[str, ...], growth: tuple[str, ...]) -> dict[str, Any]:
    """The options that flags give."""
    changes: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(OPTIONS[name].default, tuple):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            value = tuple(parts if str in OPTIONS[name].type.__args__ else map(_value, parts))
        elif {str, float} <= set(kinds_of(OPTIONS[name])):
            value = _value(value)
        changes[name] = value
    if model_options:
        pairs = [option.partition("=") for option in model_options]
        changes["model_options"] = {key: _value(value) for key, _, value in pairs}
    if growth:
        events = [event.split(":") for event in growth]
        if bad := [event for event in events if len(event) != 3 or not (event[0] + event[2]).isdecimal()]:
            raise TrainingError(f"--grow takes EPOCH:AFTER:BLOCKS, got {':'.join(bad[0])!r}")
        changes["growth"] = tuple((int(epoch), after, int(blocks)) for epoch, after, blocks in events)
    return changes


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _command() -> list[str]:
    """The arguments of Python that run this command again."""
    return ["-m", "keras_resnet.training", *sys.argv[1:]]


def _spawn(count: int, command: list[str] | None = None) -> int:
    """Run the same command in several processes on this machine, and print their output with a number in front.

    Args:
        count: Number of processes.
        command: Arguments of Python; None for this command without `--local-workers`.

    Returns:
        The exit code.
    """
    command = command or _without_local_workers(_command())
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    processes: list[subprocess.Popen] = []
    asked: list[int] = []

    def forward(number: int, frame: Any) -> None:
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # A signal that nohup or a shell has switched off stays off.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    for index in range(count):
        # One GPU cannot be shared by all; a trial runs on the CPU.
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CONFIG": tf_config(addresses, index),
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # A signal from the terminal reaches the children through this process alone, once.
                start_new_session=True,
            )
        )
    if asked:  # Before all of them were there.
        forward(asked[0], None)

    def copy(index: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            if index == 0 and line.startswith("{"):
                click.echo(line, nl=False)
            else:
                click.echo(f"[{index}] {line}", nl=False, err=True)

    threads = [threading.Thread(target=copy, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in processes]
    for thread in threads:
        thread.join()
    if asked and any(codes):
        return 128 + asked[0]
    # The return code of a process that a signal killed is the negative number of the signal.
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _without_local_workers(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--local-workers":
            skip = not skip
        elif not argument.startswith("--local-workers="):
            kept.append(argument)
    return kept


def free_ports(count: int) -> list[int]:
    """Find ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
