"""The report folder as a static site that opens from disk: templates, bundled scripts and data files.

A page opened with file:// may not fetch anything, so data are scripts. `data/<key>.js` holds

    window.circuitmill.register("<key>", <JSON>);

and pages load it with a script tag. Nothing on any page comes from another host.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from circuitmill.stores.files import atomic_write
from circuitmill.viz import formatting

_HERE = Path(__file__).parent
PAGES = ("index.html", "graph.html", "features.html", "feature.html", "tables.html")

PathOf = Callable[..., Path]
"""Path inside the report folder, folders made: `StageOutput.path`."""

# Legal in JSON but not inside a script element or, for the last two, not in an older script.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def data_script(key: str, value: object) -> str:
    r"""The text of a data file.

    The value is JSON whose angle brackets are escaped, so that no token of a corpus (`</script>`) can end the element
    it may be pasted into.

    >>> data_script("a", {"text": "</script>"})
    'window.circuitmill.register("a", {"text":"\\u003c/script\\u003e"});\n'
    """
    body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        body = body.replace(character, escape)
    return f"window.circuitmill.register({json.dumps(key)}, {body});\n"


def write_data(path_of: PathOf, key: str, value: object) -> None:
    """Write `data/<key>.js`."""
    atomic_write(path_of("data", *f"{key}.js".split("/")), data_script(key, value))


def environment() -> Environment:
    """Templates with escaping on and undefined names an error."""
    env = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "percent", "count", "duration", "size", "shown", "following"):
        env.filters[name] = getattr(formatting, name)
    return env


def write_site(path_of: PathOf, context: dict) -> None:
    """Render the pages and copy scripts and styles beside them."""
    env, sheet = environment(), (_HERE / "static" / "style.css").read_text()
    for page in PAGES:
        text = env.get_template(page).render(page=page.removesuffix(".html"), sheet=sheet, **context)
        atomic_write(path_of(page), text)
    for source in sorted((_HERE / "static").iterdir()):
        shutil.copyfile(source, path_of("static", source.name))
