#!/usr/bin/env python
"""Train a network on one device, all GPUs, or several machines; a run that was broken off goes on with the same command."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

from resnet_export.source import quiet_start

try:
    with quiet_start():
        from keras_resnet.training import Run, TrainingError, WorkerLost, train
        from keras_resnet.training.recipes import RECIPES
        from keras_resnet.training.run import CHOICES
        from keras_resnet.training.strategies import is_chief, tf_config
except KeyboardInterrupt:
    sys.exit(130)


def options_of_run(command):
    """An option for every field of `Run`; its help is the field's line in the docstring."""
    helps = _helps(Run.__doc__)
    for item in reversed(dataclasses.fields(Run)):
        if item.name in ("model_options", "growth"):
            continue
        flag, default = "--" + item.name.replace("_", "-"), item.default
        text = helps.get(item.name, "")
        if isinstance(default, bool) or item.name == "sync_batch_norm":
            option = click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=text)
        elif default == () or isinstance(default, tuple):
            option = click.option(flag, item.name, default=None, metavar="A,B,…", help=text)
        else:
            kind = click.Choice(CHOICES[item.name]) if item.name in CHOICES else _kind(item)
            option = click.option(flag, item.name, type=kind, default=None, help=text, show_default=False)
        command = option(command)
    return command


def _kind(item):
    named = [kind for kind in (int, float) if item.type is kind or kind in getattr(item.type, "__args__", ())]
    return named[0] if named else str


def _helps(docstring):
    """Field -> its line, from the `Args` of the docstring."""
    found, last = {}, []
    for line in docstring.split("Args:", 1)[1].splitlines():
        if line.startswith("        ") and not line.startswith("         ") and ":" in line:
            names, _, text = line.strip().partition(":")
            last = [name.strip() for name in names.split(",")]
            found |= {name: text.strip() for name in last}
        elif line.startswith("            "):
            found |= {name: f"{found[name]} {line.strip()}" for name in last}
    return {name: text.replace("`", "") for name, text in found.items()}


@click.command(context_settings={"max_content_width": 120, "show_default": False})
@click.argument("description", required=False, type=click.Path(dir_okay=False))
@click.option("--out", type=click.Path(file_okay=False), help="Folder for checkpoint, logs and model. Default runs/MODEL-DATA.")
@click.option(
    "--set", "model_options", multiple=True, metavar="KEY=VALUE", help="Further arguments of create_model, e.g. gate=zero_gamma."
)
@click.option("--grow", "growth", multiple=True, metavar="EPOCH:PLACES:BLOCKS", help="Grow before that epoch, e.g. 5:*_pool:1.")
@click.option("--local-workers", type=click.IntRange(2), help="Start so many processes on this machine's CPU, for a trial.")
@click.option("--recipes", is_flag=True, help="List the recipes and stop.")
@click.option("--quiet", is_flag=True, help="Print the summary only.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@options_of_run
def main(description, out, model_options, growth, local_workers, recipes, quiet, debug, **flags):
    """Train a network; DESCRIPTION is a YAML file of options (as `run.yaml` in the results), flags go on top of it.

    \b
    Examples:
      scripts/train.py --recipe cpu-budget --model resnet20 --data cifar10 --out runs/resnet20
      scripts/train.py --model resnet50 --data photos/ --recipe goyal2017 --precision mixed_float16
      scripts/train.py --data digits --epochs 3 --local-workers 2
      scripts/train.py runs/resnet20/run.yaml --seed 1 --out runs/resnet20-seed1

    Ends with one line of JSON on standard output. Exit codes: 0 done, 1 the loss or a worker was lost, 2 wrong usage or
    unreadable data, 4 a device is missing, 130 interrupted, 143 stopped by SIGTERM with everything saved.
    """
    if recipes:
        for name, recipe in RECIPES.items():
            click.echo(f"{name:16} {recipe['source']}")
        return
    run = None
    try:
        changes = _changes(flags, model_options, growth)
        run = Run.load(description, **changes) if description else Run.of(**changes)
        out = out or f"runs/{Path(run.model).stem}-{Path(run.data).stem}"
        if local_workers and run.workers:
            raise TrainingError("--local-workers starts processes of its own; leave out --workers")
        if local_workers:
            sys.exit(_spawn(local_workers))
        result = train(run, out, quiet=quiet)
    except TrainingError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        if run_waits(error, run):
            click.echo("Waiting for the other workers", err=True)
            os.execv(sys.executable, [sys.executable, *sys.argv])
        if "TF_CONFIG" in os.environ:
            # The others may still be fetching what was last summed up, and would take this process for lost.
            time.sleep(1)
        # A lost worker leaves threads of the cluster behind that would hold the process.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("Interrupted; the same command goes on from the last checkpoint", err=True)
        sys.exit(130)
    if is_chief():
        click.echo(json.dumps(result.summary))


def run_waits(error, run):
    """Whether a worker that lost another starts anew and waits."""
    return isinstance(error, WorkerLost) and run is not None and run.lost_worker == "wait"


def _changes(flags, model_options, growth):
    changes = {}
    for name, value in flags.items():
        if value is None:
            continue
        item = Run.__dataclass_fields__[name]
        if isinstance(item.default, tuple):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            value = tuple(parts if str in item.type.__args__ else map(_value, parts))
        changes[name] = value
    if model_options:
        pairs = [option.partition("=") for option in model_options]
        changes["model_options"] = {key: _value(value) for key, _, value in pairs}
    if growth:
        events = [event.split(":") for event in growth]
        if bad := [event for event in events if len(event) != 3 or not (event[0] + event[2]).isdecimal()]:
            raise TrainingError(f"--grow takes EPOCH:PLACES:BLOCKS, got {':'.join(bad[0])!r}")
        changes["growth"] = tuple((int(epoch), places, int(blocks)) for epoch, places, blocks in events)
    return changes


def _value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _spawn(count):
    """The same command in `count` processes on loopback; their output behind a number."""
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if skip or argument == "--local-workers":
            skip = not skip
        elif not argument.startswith("--local-workers="):
            arguments.append(argument)
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(count)]
    processes, asked = [], []

    def forward(number, frame):
        asked.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # What nohup or a shell has switched off stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    for index in range(count):
        # One GPU cannot be shared by all; a trial runs on the CPU.
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CONFIG": tf_config(addresses, index),
            "PYTHONUNBUFFERED": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # A signal of the terminal comes by this process alone, once.
                start_new_session=True,
            )
        )
    if asked:  # Before all of them were there.
        forward(asked[0], None)

    def copy(index, process):
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
    # A process that a signal killed has the negative number of it.
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    main()
