"""The set of models a server has: which names and versions there are, which are ready, and how they are exchanged."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import existing_file, first_line
from ..errors import ExportError, UsageError
from ..family import FILE, is_family, read_family
from .families import ServedFamily, open_model
from .models import RETRY, ServedModel, Source
from .protocol import ProtocolError

if TYPE_CHECKING:
    from .models import ModelOptions


# "stats" would collide with the path of the statistics of all models.
NAME = re.compile(r"(?!stats$)(?!\.+$)[A-Za-z0-9_.-]{1,128}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"
UNLOADED = "unloaded"

log = logging.getLogger("resnet_export.serving")


@dataclass(frozen=True)
class Entry:
    """One version of a model as the repository knows it."""

    source: Source
    state: str = UNAVAILABLE
    model: ServedModel | None = None
    reason: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.source.name, "version": self.source.version, "state": self.state, "reason": self.reason}


class Repository:
    """Models by name and version. Only names that were found when the folder was read are known; no path comes from outside.

    Args:
        files: List of `Source` that were named one by one.
        folder: Repository folder, read again on every load; None for none.
        options: `ModelOptions`.

    Raises:
        UsageError: No model at all, a name twice, or a bad name.
    """

    def __init__(self, files: Sequence[Source], folder: str | os.PathLike[str] | None, options: ModelOptions) -> None:
        self._files, self._folder, self._options = files, folder, options
        self._entries = {(source.name, source.version): Entry(source) for source in self._find()}
        self._changing = asyncio.Lock()
        if not self._entries:
            raise UsageError(f"{folder} holds no models (NAME/VERSION/model.onnx)" if folder else "there is no model to serve")

    def open(self, warm_up: bool = False) -> None:
        """Open every model.

        Args:
            warm_up: Warm them up now; otherwise `warm_up` must be called before they are used.

        Raises:
            UsageError, DeviceError: A model does not open, or none has the output that the options name.
        """
        for key, entry in self._entries.items():
            model = open_model(entry.source, self._options)
            if warm_up:
                model.warm_up()
            self._entries[key] = Entry(entry.source, READY if warm_up else LOADING, model)
        if self._options.adaptive and not any(isinstance(entry.model, ServedFamily) for entry in self._entries.values()):
            raise UsageError("--adaptive needs a family, as `resnet-export family` writes it; no model is one")
        outputs = {spec.name for entry in self._entries.values() for spec in entry.model.outputs}
        if self._options.scores is not None and self._entries and self._options.scores not in outputs:
            raise UsageError(f"no model has an output {self._options.scores!r}; their outputs are {', '.join(sorted(outputs))}")

    async def warm_up(self) -> list[str]:
        """Warm up what `open` has opened, one after the other, each ready as soon as it is done.

        Returns:
            List of reasons why models did not become ready.
        """
        async with self._changing:
            for key, entry in self._entries.items():
                if entry.state != LOADING:
                    continue
                try:
                    await asyncio.to_thread(entry.model.warm_up)
                    self._entries[key] = replace(entry, state=READY)
                except Exception as error:
                    reason = f"model {entry.source.name!r} does not run: {first_line(error)}"
                    self._entries[key] = replace(entry, state=UNAVAILABLE, reason=reason)
        return [entry.reason for entry in self._entries.values() if entry.reason]

    @property
    def ready(self) -> bool:
        """Whether all models are ready, apart from those that were unloaded on purpose."""
        return all(entry.state == READY or entry.reason == UNLOADED for entry in self._entries.values())

    def models(self) -> list[ServedModel]:
        """Return all models that are ready, by name and version."""
        return [entry.model for _, entry in sorted(self._entries.items(), key=_order) if entry.state == READY]

    def names(self) -> list[str]:
        """Return all names."""
        return sorted({name for name, _ in self._entries})

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are ready, oldest first."""
        found = sorted(self._entries.items(), key=_order)
        return [version for (known, version), entry in found if known == name and entry.state == READY]

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """Return a model that is ready; the newest version if none is named.

        Raises:
            ProtocolError: There is none (404), or it is still being loaded (503).
        """
        entries = {key[1]: entry for key, entry in sorted(self._entries.items(), key=_order) if key[0] == name}
        if not entries:
            raise ProtocolError(f"there is no model {name[:128]!r}; there are {', '.join(self.names())}", 404)
        if version is not None and version not in entries:
            raise ProtocolError(f"model {name!r} has no version {version[:32]!r}; it has {', '.join(entries)}", 404)
        wanted = [entries[version]] if version is not None else list(entries.values())
        ready = [entry.model for entry in wanted if entry.state == READY]
        if ready:
            return ready[-1]
        if any(entry.state == LOADING for entry in wanted):
            raise ProtocolError(f"model {name!r} is still being loaded", 503, RETRY)
        raise ProtocolError(f"model {name!r} is not loaded", 404)

    def index(self) -> list[dict[str, str]]:
        """Return the repository index: a list of `{"name", "version", "state", "reason"}`."""
        return [entry.to_json() for _, entry in sorted(self._entries.items(), key=_order)]

    async def load(self, name: str) -> None:
        """Load the versions of a model that are there now; those loaded before answer until their successors are ready.

        Raises:
            ProtocolError: There is no such model (404), or one of its versions does not open (400; the old ones stay).
        """
        async with self._changing:
            sources = [source for source in await asyncio.to_thread(self._find_for_client) if source.name == name]
            if not sources:
                raise ProtocolError(f"there is no model {name[:128]!r} in the repository", 404)
            opened = [Entry(source, READY, await asyncio.to_thread(self._opened, source)) for source in sources]
            await self._exchange(name, opened)

    async def unload(self, name: str) -> None:
        """Stop serving a model; requests it has taken are finished.

        Raises:
            ProtocolError: There is no such model.
        """
        async with self._changing:
            entries = [entry for entry in self._entries.values() if entry.source.name == name]
            if not entries:
                raise ProtocolError(f"there is no model {name[:128]!r}", 404)
            await self._exchange(name, [Entry(entry.source, UNAVAILABLE, reason=UNLOADED) for entry in entries])

    async def close(self) -> None:
        """Finish what the models have taken, and let go of them."""
        for entry in self._entries.values():
            if entry.model:
                await entry.model.close()

    async def _exchange(self, name, entries):
        old = [key for key in self._entries if key[0] == name]
        leaving = [self._entries.pop(key).model for key in old]
        self._entries |= {(name, entry.source.version): entry for entry in entries}
        for model in leaving:
            if model:
                await model.close()

    def _opened(self, source):
        try:
            model = open_model(source, self._options)
            model.warm_up()
        except ExportError as error:
            # The message for the log names the file; the one for the client must not.
            reason = first_line(error).replace(str(source.path), source.path.name)
            raise ProtocolError(f"version {source.version} of model {source.name!r} does not open: {reason}") from error
        return model

    def _find_for_client(self):
        try:
            return self._find()
        except UsageError as error:
            raise ProtocolError("the model repository cannot be read", 500) from error

    def _find(self):
        for source in self._files:
            check_name(source)
        found = find_models(self._folder) if self._folder else []
        # One folder that cannot be served must not make all the others unavailable.
        sources = self._files + [source for source in found if _has_good_name(source)]
        keys = [(source.name, source.version) for source in sources]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UsageError(f"version {twice[0][1]} of model {twice[0][0]!r} is given twice")
        return sources


def parse_sources(arguments: Iterable[str]) -> list[Source]:
    """`MODEL.onnx` and `NAME=MODEL.onnx` as sources; a name that comes again is the next version. So with `family.json`, which
    has the name of its network by default.

    Args:
        arguments: Strings of the command line.

    Returns:
        List of `Source`.

    Raises:
        UsageError: A file is missing.
    """
    sources = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        path = existing_file(path if equals else argument)
        if not equals:
            name = _plain_name(read_family(path).name) if is_family(path) else path.stem
        version = str(1 + sum(source.name == name for source in sources))
        sources.append(Source(name, version, path.absolute()))
    return sources


def _plain_name(name: str) -> str:
    """The name of a network without characters that the name of a model may not have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:128]


def check_name(source: Source) -> None:
    """Refuse a `Source` whose name would need quoting in URLs, leave a folder, or hide another path (`UsageError`)."""
    if not NAME.fullmatch(source.name):
        rule = "letters, digits, `_`, `.` and `-`, and is not `stats`"
        raise UsageError(f"a model's name has {rule}; got {source.name!r}: write NAME={source.path.name}")


def _has_good_name(source: Source) -> bool:
    try:
        check_name(source)
    except UsageError as error:
        log.warning("%s is not served: %s", source.path, error)
        return False
    return True


def find_models(folder: str | os.PathLike[str]) -> list[Source]:
    """Find the models of a repository folder: `NAME/VERSION/model.onnx`, `NAME.onnx` and `NAME/family.json`.

    Returns:
        List of `Source`.

    Raises:
        UsageError: There is no such folder.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    sources = [Source(path.stem, "1", path) for path in folder.glob("*.onnx") if path.is_file()]
    sources += [Source(path.parent.name, "1", path) for path in folder.glob(f"*/{FILE}") if path.is_file()]
    for path in folder.glob("*/*/model.onnx"):
        if VERSION.fullmatch(path.parent.name):
            # With external data, Triton wants a folder model.onnx that holds model.onnx and its data.
            file = path / "model.onnx" if path.is_dir() else path
            sources.append(Source(path.parent.parent.name, path.parent.name, file))
    return sorted(sources, key=lambda source: (source.name, int(source.version)))


def _order(item):
    (name, version), _ = item
    return name, int(version)
