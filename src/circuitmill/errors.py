"""Every error that circuitmill raises on purpose.

A message has four parts: what was expected, what was found, where, and what to do about it. Only the command line
turns an error into an exit code; nothing below it catches one to carry on with a substitute.
"""


class CircuitmillError(Exception):
    """Base of all errors of this package.

    Args:
        expected: What should have been there, as a clause.
        found: The value that was there instead.
        where: Dotted configuration key, or file and position.
        fix: What the reader can do.
    """

    exit_code = 1

    def __init__(self, expected: str, *, found: object, where: object, fix: str) -> None:
        self.expected, self.found, self.where, self.fix = expected, found, where, fix
        super().__init__(f"{expected}; found {found}\n  where: {where}\n  fix:   {fix}")


class ConfigError(CircuitmillError, ValueError):
    """A configuration value is unknown, missing, of the wrong type or makes no sense."""

    exit_code = 2


class ShapeError(CircuitmillError, ValueError):
    """A tensor does not have the shape that its neighbours imply."""


class StoreError(CircuitmillError):
    """A file is missing, truncated, damaged or of another format version."""


class UpstreamError(CircuitmillError):
    """What an earlier stage left is missing, incomplete, of another revision or made from something else."""


class DivergedError(CircuitmillError):
    """A number that must be finite or above a bar is not."""


class ClientError(CircuitmillError):
    """A service that a client talks to refused, timed out or answered something unusable."""


class RankError(CircuitmillError):
    """Another rank that works on the same stage failed, died or stands still, so that this one cannot go on."""


class InterruptedRun(CircuitmillError):
    """A signal asked for a stop; a checkpoint was written and running the same command again continues."""

    exit_code = 75
