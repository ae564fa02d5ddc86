"""The only importer of hydra: composes a run's configuration tree from the option files under `config/`."""

import os
from pathlib import Path

from circuitmill.config.run import Run, decode_run, variant_names
from circuitmill.errors import ConfigError
from circuitmill.pipeline import STAGES

ENVIRONMENT = "CIRCUITMILL_CONFIG"


def config_folder() -> Path:
    """The folder of option files: $CIRCUITMILL_CONFIG, else `config/` here, else that of the source checkout.

    Raises:
        ConfigError: none of them is there.
    """
    checkout = Path(__file__).resolve().parents[3] / "config"
    named = os.environ.get(ENVIRONMENT)
    candidates = [Path(named)] if named else [Path("config").resolve(), checkout]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ConfigError(
        "a folder with config.yaml",
        found="none",
        where=" or ".join(map(str, candidates)),
        fix=f"run from the checkout or set {ENVIRONMENT}",
    )


def experiments() -> tuple[str, ...]:
    """Names of the complete runs under `config/experiment/`."""
    return tuple(sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml")))


def compose(overrides: list[str]) -> dict:
    """The plain tree of one composition.

    Args:
        overrides: In hydra's grammar: `experiment=demo`, `train.lr=3e-4`, `cache=int8`.

    Raises:
        ConfigError: an unknown option file or key, or a broken override.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = config_folder()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(folder)):
            tree = hydra_compose("config", overrides=overrides)
            return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "overrides that the option files allow",
            found=reason,
            where=" ".join(overrides) or str(folder),
            fix=f"experiments: {', '.join(experiments())}; keys: `circuitmill config experiment=NAME`",
        ) from error


def load_run(experiment: str, overrides: list[str] | None = None) -> Run:
    """Compose and decode a run with all its variants.

    A variant is a list of overrides of stages' options or of the model, applied after the run's own.

    Raises:
        ConfigError: anything is wrong with the run or one of its variants.
    """
    base = [f"experiment={experiment}", *(overrides or [])]
    tree = compose(base)
    variants = tree.get("variants") or {}
    allowed = {row.name for row in STAGES} | {"model"}
    composed = {}
    for name in variant_names(variants):
        extra = [str(item) for item in variants.get(name, [])]
        for item in extra:
            if item.lstrip("+~").split("=")[0].split(".")[0] not in allowed:
                raise ConfigError(
                    "a variant that overrides options of stages or of the model only",
                    found=item,
                    where=f"variants.{name}",
                    fix="keys: `circuitmill config experiment=NAME`; what else differs makes another experiment",
                )
        composed[name] = compose(base + extra) if extra else tree
    return decode_run(composed)


def freeze(data: dict, heading: str) -> str:
    """A stage's plain configuration as YAML text, keys in the order of the option file."""
    import yaml

    return f"# {heading}\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def read_frozen(path: Path) -> dict:
    """Read a frozen stage configuration.

    Raises:
        ConfigError: no such file, or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "a frozen stage configuration in YAML", found=error, where=path, fix="run `snakemake configure`"
        ) from error
