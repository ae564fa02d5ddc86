"""What Snakemake asks of conda, for tests on machines without one: environments made of what is installed here.

`env create` reads the file as conda would, demands that every pin is the version that is here, and links these
packages, and no others, into a virtual environment. A stage runs in it exactly if the file names all that it imports.
"""

import json
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import yaml

STARTED = "import pathlib, sys\npathlib.Path(sys.prefix, 'started').touch()\n"


def create(file: Path, prefix: Path) -> None:
    """Make the environment of a file; its interpreter leaves a file `started` in it."""
    venv.create(prefix, symlinks=True, with_pip=False)
    packages = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    here = Path(sysconfig.get_path("purelib"))
    python, pip, listed = yaml.safe_load(file.read_text())["dependencies"]
    assert (python, pip) == ("python=3.11", "pip"), (python, pip)
    for pin in listed["pip"]:
        name, expected = pin.split("==")
        found = distribution(name)
        assert found.version.split("+")[0] == expected, f"expected {pin}, found {found.version}"
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(here / top)
    (packages / "sitecustomize.py").write_text(STARTED)


def main(arguments: list[str]) -> None:
    """The subcommands that Snakemake calls."""
    match arguments:
        case ["info", "--json"]:
            print(json.dumps({"conda_prefix": str(Path(__file__).parent), "platform": "linux-64"}))  # noqa: T201
        case ["--version"]:
            print("conda 99.0.0")  # noqa: T201
        case ["config", "--get", "channel_priority", "--json"]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))  # noqa: T201
        case ["env", "create", "--quiet", "--no-default-packages", "--file", file, "--prefix", prefix]:
            create(Path(file), Path(prefix))
        case ["clean", "-y", "--tarballs"]:
            pass
        case _:
            sys.exit(f"conda {' '.join(arguments)}: not expected of Snakemake")


if __name__ == "__main__":
    main(sys.argv[1:])
