"""The record of a run's controllers, the snakemake processes that worked on it: `results/<run>/logs/controllers.jsonl`.

`circuitmill.controllers.record` writes it, a JSON object a line.
"""

import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from circuitmill import controllers
from circuitmill.errors import ConfigError, StoreError

_KINDS: dict[str, type] = {"pid": int, "host": str, "started": str, "log": str, "argv": list, "folder": str}


@dataclass(frozen=True)
class Controller:
    """A snakemake process that worked on a run, or still does."""

    pid: int
    host: str
    started: datetime
    log: Path
    """Snakemake's log; relative to `folder` or absolute."""
    argv: tuple[str, ...]
    folder: Path

    def log_path(self) -> Path:
        """Where Snakemake's log is."""
        return self.folder / self.log

    def here(self) -> bool:
        """Whether it was started on this machine."""
        return self.host == socket.gethostname()

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        return {
            "pid": self.pid,
            "host": self.host,
            "started": self.started.isoformat(),
            "log": str(self.log),
            "argv": list(self.argv),
            "folder": str(self.folder),
        }


@dataclass(frozen=True)
class RunRecord:
    """What is recorded of a run."""

    folder: Path
    """`results/<run>`, absolute."""
    controllers: tuple[Controller, ...]
    """Of this checkout, oldest first."""
    foreign: tuple[Controller, ...] = ()
    """Recorded, but for another folder: the results were copied or moved from there."""

    @property
    def newest(self) -> Controller | None:
        """The controller that was started last."""
        return self.controllers[-1] if self.controllers else None


def parse_controllers(text: str, where: object) -> list[Controller]:
    """The controllers of a record's text, oldest first. A last line without its end counts as not written.

    Args:
        where: The file, for messages.

    Raises:
        StoreError: a line is no record of a controller.
    """
    lines = text.split("\n")[:-1]
    return [_controller(line, f"{where}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _controller(line: str, where: str) -> Controller:
    try:
        data = json.loads(line)
        wrong = "" if isinstance(data, dict) else f"{type(data).__name__} {line[:60]!r}"
        wrong = wrong or ", ".join(
            f"{key}={data.get(key)!r}" for key, kind in _KINDS.items() if type(data.get(key)) is not kind
        )
        if not wrong and not (data["argv"] and all(isinstance(word, str) for word in data["argv"])):
            wrong = f"argv={data['argv']!r}"
        started = None if wrong else datetime.fromisoformat(data["started"])
        if started is not None and started.tzinfo is None:
            wrong = f"started={data['started']!r} without a time zone"
    except ValueError as error:
        wrong, data, started = f"{line[:60]!r} ({error})", {}, None
    if wrong or started is None:
        raise StoreError(
            "one JSON object a line: pid, host, started, log, argv, folder",
            found=wrong,
            where=where,
            fix="remove the line",
        )
    return Controller(data["pid"], data["host"], started, Path(data["log"]), tuple(data["argv"]), Path(data["folder"]))


def read_record(folder: Path) -> RunRecord:
    """The record of a run; without controllers if nothing is recorded.

    Args:
        folder: `results/<run>`.

    Raises:
        StoreError: no folder of a run, or a record that cannot be read.
    """
    # not resolved: `results` may be a link to another disk, and the run's name is that of the folder as it is named
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    path = folder / controllers.FILE
    if not path.exists():
        if not any((folder / name).is_dir() for name in ("config", "logs")):
            raise StoreError(
                "a run's folder, with config/ or logs/ in it",
                found="neither" if folder.is_dir() else "no folder",
                where=folder,
                fix="name results/<run>; `snakemake --config run=NAME` makes it",
            )
        return RunRecord(folder, ())
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            "a record of controllers", found=error, where=path, fix="make it readable, or remove it"
        ) from error
    found = parse_controllers(text, path)
    ours = [controller for controller in found if _is_of(controller, folder)]
    return RunRecord(folder, tuple(ours), tuple(one for one in found if one not in ours))


def _is_of(controller: Controller, folder: Path) -> bool:
    return os.path.realpath(controller.folder / "results" / folder.name) == os.path.realpath(folder)


def snakemake_config(argv: Sequence[str]) -> dict[str, str]:
    """What a Snakemake command line sets with `--config`; the last one counts.

    >>> snakemake_config(["snakemake", "all", "--config", "run=demo", "set=train.lr=1e-3 cache=int4", "--jobs", "4"])
    {'run': 'demo', 'set': 'train.lr=1e-3 cache=int4'}
    """
    values: dict[str, str] = {}
    reading = False
    for word in argv[1:]:
        if word.startswith("-"):
            flag, given, first = word.partition("=")
            reading = flag in ("--config", "-C")
            if reading:
                values = dict([first.split("=", 1)]) if given and "=" in first else {}
        elif reading and "=" in word:
            key, value = word.split("=", 1)
            values[key] = value
    return values


def run_and_overrides(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The experiment and the overrides of a Snakemake command line, as the workflow takes them.

    Raises:
        ConfigError: quotes in `set` do not match.
    """
    values = snakemake_config(argv)
    try:
        return values.get("run", "demo"), shlex.split(values.get("set", ""))
    except ValueError as error:
        raise ConfigError(
            "overrides separated by spaces, with quotes that match",
            found=repr(values["set"]),
            where="--config set=",
            fix=f"correct the quotes ({error})",
        ) from error


def resume_command(argv: Sequence[str], extra: Sequence[str] = ()) -> list[str]:
    """The recorded command again, so that it does incomplete work anew.

    Args:
        extra: More options for Snakemake; those win over the recorded ones.

    Raises:
        ConfigError: an extra word would be taken for another run, or for a value of an earlier option.
    """
    if extra and not extra[0].startswith("-"):
        raise ConfigError(
            "options of snakemake after --",
            found=extra[0],
            where="command line",
            fix="put an option first: -- --jobs 10",
        )
    if any(word.partition("=")[0] in ("--config", "-C") for word in extra):
        raise ConfigError(
            "the configuration that the run was started with",
            found=" ".join(extra),
            where="command line",
            fix="leave --config out; `snakemake --config run=NAME set=...` starts with another",
        )
    present = {"--rerun-incomplete", "--ri"} & {*argv, *extra}
    return _with(argv, [] if present else ["--rerun-incomplete"], extra)


def unlock_command(argv: Sequence[str]) -> list[str]:
    """The command that removes the lock which a killed controller left."""
    return _with(argv, ["--unlock"], ())


def _with(argv: Sequence[str], front: Sequence[str], back: Sequence[str]) -> list[str]:
    """The words of a command line that can be executed, with options in front and others behind."""
    program, words = [argv[0]], list(argv[1:])
    if Path(argv[0]).name == "__main__.py":  # it was `python -m snakemake`
        program = [sys.executable, "-m", "snakemake"]
    end = words.index("--") if "--" in words else len(words)
    # options without values go in front, where they end no list of values and belong to none
    return [*program, *front, *words[:end], *back, *words[end:]]
