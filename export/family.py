"""A family: one network at several depths, each a file of its own, and `family.json`, which says what each of them is.

`family.json` is written last, next to the files that it names. It holds the fields of `Family`, its members with the fields of
`Member`, and the version of its format.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .artifact import digest, existing_file
from .errors import MismatchError, UsageError

FILE = "family.json"
FORMAT = 1


@dataclass(frozen=True)
class Member:
    """One network of a family as a file.

    Attributes:
        name: Name by which a request asks for it, e.g. `"0.75"`, `"5ms"` or `"0.75-int8"`.
        file: Name of the ONNX file, next to `family.json`.
        sha256: Digest of the file and its external data, see `artifact.digest`.
        size: Size in bytes.
        precision: `"float32"` or `"int8"`.
        budget: Requested share of the multiply-adds, or None.
        share: Its multiply-adds as a share of the whole network's.
        macs: Its multiply-adds for one input.
        removed: Paths of the residual blocks that are left out.
        latency_ms: Median latency, as `Family.measured` says.
        agreement: Share of the measured images on which it decides like the whole network, or None.
        accuracy: Share of the measured images that it classifies correctly, or None.
    """

    name: str
    file: str
    sha256: str
    size: int
    precision: str
    budget: float | None
    share: float
    macs: int
    removed: tuple[str, ...]
    latency_ms: float
    agreement: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Family:
    """A family, the member that costs most first.

    Attributes:
        name: Name of the network.
        members: The files.
        ranked_by: How blocks were chosen: `"loss"`, or `"drift"` on random inputs where there were no data.
        images: Number of images that agreement and accuracy were measured on.
        calibration_images: Number of images that batch-norm statistics were recalibrated on.
        measured: Where latencies were measured: `{"device", "batch", "threads", "onnxruntime", "processor"}`.
        notes: What the user should know.
    """

    name: str
    members: tuple[Member, ...]
    ranked_by: str
    images: int
    calibration_images: int
    measured: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `family.json` holds them."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def member(self, name: str | float) -> Member | None:
        """Find a member by its name, or by the budget that was asked for; None if there is none."""
        if isinstance(name, str):
            found = next((member for member in self.members if member.name == name), None)
            if found is not None:
                return found
            try:
                name = float(name)
            except ValueError:
                return None
        wanted = (member for member in self.members if member.budget == name and member.precision == "float32")
        return next(wanted, None)


def is_family(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of a family rather than of an ONNX file."""
    return Path(path).suffix.lower() == ".json"


def read_family(path: str | os.PathLike[str]) -> Family:
    """Read `family.json`; its members are not opened.

    Raises:
        UsageError: The file is missing, or is not a family that this version knows.
    """
    path = existing_file(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored.pop("format")
        if version != FORMAT:
            raise UsageError(f"{path} has format {version!r}, which this version does not know; it knows {FORMAT}")
        members = tuple(Member(**{**member, "removed": tuple(member["removed"])}) for member in stored.pop("members"))
        family = Family(**{**stored, "members": members, "notes": tuple(stored.get("notes", ()))})
        if not members or any(Path(member.file).name != member.file for member in members):
            raise ValueError("it does not name a file next to it")
        if len({member.name for member in members}) < len(members):
            raise ValueError("two members have the same name")
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} is not a family as `resnet-export family` writes it ({reason})") from error
    return family


def check_files(path: str | os.PathLike[str], members: Iterable[Member]) -> None:
    """Refuse members whose files are not those that `family.json` was written for.

    Raises:
        UsageError: A file is missing.
        MismatchError: A file was replaced or changed.
    """
    for member in members:
        file = Path(path).parent / member.file
        if not file.is_file():
            raise UsageError(f"{path} names the member {member.file}, which is missing; export the family again")
        if digest(file) != member.sha256:
            raise MismatchError(
                f"{file} is not the file that {Path(path).name} was written for: its digest differs; export the family again"
            )
