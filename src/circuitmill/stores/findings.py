"""What `circuitmill verify` found, as data and as text."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    path: Path
    """The file, or the folder, that is meant."""
    expected: str
    found: str
    fix: str
    warning: bool = False
    """It is out of place, but nothing reads it."""

    def __str__(self) -> str:
        word = "warning" if self.warning else "problem"
        return f"{word}: {self.path}\n  expected: {self.expected}\n  found:    {self.found}\n  fix:      {self.fix}"


@dataclass(frozen=True)
class Checked:
    """A manifest and what is wrong with what it describes."""

    path: Path
    files: int = 0
    """Listed files that were looked at."""
    bytes: int = 0
    """What was read of them."""
    findings: tuple[Finding, ...] = ()

    @property
    def good(self) -> bool:
        """Whether there is nothing worse than a warning."""
        return all(finding.warning for finding in self.findings)


@dataclass(frozen=True)
class Report:
    """What `verify` saw."""

    manifests: tuple[Checked, ...]
    """In the order of the pipeline, units before what is gathered from them."""
    others: tuple[Finding, ...]
    """What belongs to no manifest there."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything found, in the order in which to mend it."""
        return tuple(finding for checked in self.manifests for finding in checked.findings) + self.others

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings that are more than warnings."""
        return tuple(finding for finding in self.findings if not finding.warning)

    def text(self) -> str:
        """A line per good manifest, a block per finding (problems last), and a line that sums up."""
        lines = [f"{one.path}: {one.files} files, {one.bytes:,} bytes good" for one in self.manifests if one.good]
        warnings = [finding for finding in self.findings if finding.warning]
        lines += [str(finding) for finding in (*warnings, *self.problems)]
        if any("snakemake " in problem.fix for problem in self.problems):
            lines.append(
                "Run the fixes from the top, each by itself (a run made with set='...' needs it there too). What is\n"
                "made again alone and comes out with the same bytes leaves everything after it as it is."
            )
        files, size = sum(one.files for one in self.manifests), sum(one.bytes for one in self.manifests)
        verdict = f"{len(self.problems)} problems" if self.problems else "all good"
        verdict += f", {len(warnings)} warnings" if warnings else ""
        return "\n".join([*lines, f"{len(self.manifests)} manifests, {files} files, {size:,} bytes read: {verdict}"])
