"""What Snakemake's own log says: the Slurm run it was, which job is which, and what failed."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

_RUN_ID = re.compile(r"SLURM run ID: (\S+)")
_RULE = re.compile(r"(?:local)?(?:rule|checkpoint) (\w+):$")
_ONE = re.compile(r"Job (\d+) has been submitted with SLURM jobid (\d+) ")
_ARRAY = re.compile(r"Submitted array job with Snakemake IDs ([\d,]+) and SLURM job ID (\d+)\.")
_ERROR = re.compile(r"Error in rule (\w+):$")
_NO_OUTPUT = re.compile(r"Job (\d+)\s+completed successfully, but some output files are missing\.")
_RESTART = re.compile(r"Trying to restart job (\d+)\.")
_FINISHED = re.compile(r"Finished jobid: (\d+) ")
_COMPLETE = "Complete log(s): "
_SHELL_END = "        (command exited with non-zero exit code)"
_HINT = " (check log file(s) for error details)"
_ADVICE = "For further error details see the cluster/cloud log and the log files of the involved rule(s)."


@dataclass(frozen=True)
class Task:
    """A job of the workflow."""

    rule: str
    wildcards: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """A job that failed at least once and has not finished since."""

    jobid: int
    """Snakemake's number of it."""
    rule: str
    wildcards: dict[str, str]
    attempts: int
    """How often it failed."""
    retried: bool
    """Whether it was started again after the last failure."""
    message: str
    """Snakemake's words about the last failure; empty if it has none."""
    logs: tuple[Path, ...]
    """The rule's logs, and the Slurm job's behind them."""
    slurm_job: str | None
    """As squeue writes it: `12`, or `12_3` in an array."""


@dataclass
class SnakemakeLog:
    """A log so far."""

    run_id: str | None = None
    """The name of its Slurm jobs; None if it submits none."""
    ended: bool = False
    """Whether the controller wrote its closing words; one that was killed did not."""
    tasks: dict[int, Task] = field(default_factory=dict)
    """Snakemake's job number -> job."""
    submitted: dict[str, int] = field(default_factory=dict)
    """Slurm's job -> Snakemake's job number; a retry has another Slurm job."""
    failures: dict[int, Failure] = field(default_factory=dict)

    def task_of(self, slurm_job: str) -> Task | None:
        """The job of the workflow that a Slurm job works on; None if the log does not tell."""
        number = self.submitted.get(slurm_job)
        return None if number is None else self.tasks.get(number)


def parse_log(text: str) -> SnakemakeLog:
    """Read a Snakemake log, also of a controller that still writes it."""
    log = SnakemakeLog()
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if rule := _RULE.match(line):
            values, at = _block(lines, at)
            if values.get("jobid", "").isdigit():
                log.tasks[int(values["jobid"])] = Task(rule[1], _wildcards(values.get("wildcards", "")))
        elif error := _ERROR.match(line):
            values, at = _block(lines, at)
            _note_failure(log, error[1], values)
        elif one := _ONE.match(line):
            log.submitted[one[2]] = int(one[1])
        elif array := _ARRAY.match(line):
            log.submitted |= {f"{array[2]}_{k}": int(number) for k, number in enumerate(array[1].split(","), 1)}
        else:
            _note_course(log, line)
    return log


def _note_course(log: SnakemakeLog, line: str) -> None:
    if run_id := _RUN_ID.match(line):
        log.run_id = run_id[1]
    elif finished := _FINISHED.match(line):
        log.failures.pop(int(finished[1]), None)
    elif restart := _RESTART.match(line):
        if failure := log.failures.get(int(restart[1])):
            log.failures[failure.jobid] = replace(failure, retried=True)
    elif missing := _NO_OUTPUT.match(line):
        if task := log.tasks.get(int(missing[1])):
            words = {"jobid": missing[1], "message": "it ended well, but its output is not there"}
            _note_failure(log, task.rule, words)
    elif line.startswith(_COMPLETE):
        log.ended = True


def _note_failure(log: SnakemakeLog, rule: str, values: dict[str, str]) -> None:
    if not values.get("jobid", "").isdigit():
        return  # the end of the log, in the middle of the block
    number = int(values["jobid"])
    task, before = log.tasks.get(number), log.failures.get(number)
    message = values.get("message", "")
    log.failures[number] = Failure(
        jobid=number,
        rule=rule,
        wildcards=task.wildcards if task else {},
        attempts=1 + (before.attempts if before else 0),
        retried=False,
        message="" if message == "None" else message.removesuffix(_ADVICE).strip(),
        logs=tuple(Path(name) for name in values.get("log", "").removesuffix(_HINT).split(", ") if name),
        slurm_job=values.get("external_jobid"),
    )


def _block(lines: list[str], at: int) -> tuple[dict[str, str], int]:
    """The `key: value` lines of a block and where it ends; a shell command in it is passed over."""
    values: dict[str, str] = {}
    while at < len(lines) and lines[at].startswith("    "):
        key, _, value = lines[at].strip().partition(": ")
        at += 1
        if key == "shell:":
            # as many lines as the command has, indented as its author liked
            end = next((k for k in range(at, len(lines)) if lines[k] == _SHELL_END), None)
            if end is None:
                break
            at = end + 1
        else:
            values[key] = value
    return values, at


def _wildcards(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(", ") if "=" in part)


def slurm_log(path: Path, slurm_job: str) -> Path:
    """Where a Slurm job's log is; tasks of arrays have theirs one folder above the place that messages name."""
    above = path.parent.parent / f"{slurm_job}.log"
    return above if not path.exists() and above.exists() else path
