"""What a command line says of an experiment."""

from collections.abc import Sequence

from circuitmill.errors import ConfigError


def split_experiment(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The experiment's name, and the other overrides.

    Raises:
        ConfigError: no experiment is named.
    """
    rest, experiment = [], None
    for item in overrides:
        if item.startswith("experiment="):
            experiment = item.removeprefix("experiment=")
        else:
            rest.append(item)
    if experiment is None:
        raise ConfigError(
            "either --config FILE or experiment=NAME",
            found=" ".join(overrides) or "neither",
            where="command line",
            fix="name the frozen configuration or the experiment",
        )
    return experiment, rest
