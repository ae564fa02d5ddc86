"""The picture of the rules agrees with the rules; `make rulegraph` draws it anew, with Graphviz.

Left out are `all`, `configure` (every rule reads its part of the configuration) and edges that follow from others.
"""

import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
from tests.conftest import REPOSITORY
from tests.workflow.test_tiny_run import call

PICTURE = REPOSITORY / "docs/images/rulegraph.svg"
LEFT_OUT = {"all", "configure"}
Edge = tuple[str, str]
"""A rule, and one that reads what it makes."""

FONT = 'fontname="Helvetica,Arial,sans-serif", fontsize=11'
HEAD = f"""digraph rules {{
graph [bgcolor="white", pad=0.1, nodesep=0.35, ranksep=0.2]
node [shape=box, style="rounded,filled", fillcolor="#f5f6f8", color="#59626e", {FONT}, height=0.28, margin="0.14,0.03"]
edge [color="#59626e", arrowsize=0.6]
"""
ONE_OF_SEVERAL = ' [peripheries=2, fillcolor="#e3edf8", color="#0a5fb4"]'
"""Style of a rule with a job per shard, block or prompt."""


def read_dot(text: str) -> tuple[set[str], set[Edge]]:
    """Rules and edges of what `snakemake --rulegraph` prints."""
    names = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)"', text, re.MULTILINE))
    edges = {(names[source], names[target]) for source, target in re.findall(r"(\d+) -> (\d+)", text)}
    return set(names.values()) - LEFT_OUT, {edge for edge in edges if not LEFT_OUT & set(edge)}


def reduced(edges: set[Edge]) -> set[Edge]:
    """Edges that do not follow from others: there is no longer way from the one to the other."""
    after: dict[str, set[str]] = {}
    for source, target in edges:
        after.setdefault(source, set()).add(target)

    def reached(rule: str) -> set[str]:
        return {rule}.union(*(reached(one) for one in after.get(rule, ())))

    return {
        (source, target)
        for source, target in edges
        if not any(target in reached(between) for between in after[source] - {target})
    }


def dot(rules: set[str], edges: set[Edge]) -> str:
    """What Graphviz draws."""
    nodes = [f'"{rule}"' + ("" if rule.startswith("run_") else ONE_OF_SEVERAL) for rule in sorted(rules)]
    return HEAD + "\n".join(nodes + [f'"{source}" -> "{target}"' for source, target in sorted(edges)]) + "\n}\n"


def read_picture(text: str) -> tuple[set[str], set[Edge]]:
    """Rules and edges of a picture, by the titles that Graphviz gives them."""
    found = {"node": set(), "edge": set()}
    drawing = ElementTree.fromstring(text)  # noqa: S314  # a file of this repository
    for group in drawing.iter("{http://www.w3.org/2000/svg}g"):
        if group.get("class") in found:
            found[group.get("class")].add(group.findtext("{http://www.w3.org/2000/svg}title"))
    return found["node"], {tuple(title.split("->")) for title in found["edge"]}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[Edge]]:
    """Rules and reduced edges of the demo."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    done = call(folder, "snakemake", "all", "--config", "run=demo", "--rulegraph", "dot")
    assert done.returncode == 0, done.stderr
    names, edges = read_dot(done.stdout)
    return names, reduced(edges)


def test_picture_shows_the_rules_as_they_are(rules: tuple[set[str], set[Edge]], request: pytest.FixtureRequest):
    current = PICTURE.exists() and read_picture(PICTURE.read_text()) == rules
    if request.config.getoption("--fix") and not current:
        program = shutil.which("dot")
        assert program, "install graphviz to draw the picture"
        done = subprocess.run([program, "-Tsvg"], input=dot(*rules), capture_output=True, text=True, check=True)
        PICTURE.write_text(done.stdout)
    assert read_picture(PICTURE.read_text()) == rules, "run `make rulegraph`"


def test_an_edge_that_follows_from_others_is_left_out():
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    assert reduced(chain | {("a", "c"), ("a", "d"), ("b", "d")}) == chain
    fork = {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}
    assert reduced(fork) == fork


def test_another_rule_or_edge_is_noticed(rules: tuple[set[str], set[Edge]]):
    names, edges = rules
    text = PICTURE.read_text()
    for rule in names:
        assert read_picture(text.replace(f">{rule}<", ">another<")) != rules
    for source, target in edges:
        title = f"{source}&#45;&gt;{target}"
        assert title in text and read_picture(text.replace(title, f"{target}&#45;&gt;{source}")) != rules


def test_snakemakes_text_is_read_whole():
    text = 'digraph snakemake_dag {\n\t0[label = "all"];\n\t1[label = "run_b", color = "0.1 0.6 0.85"];\n'
    text += '\t2[label = "a_shard"];\n\t3[label = "configure"];\n\t1 -> 0\n\t2 -> 1\n\t3 -> 2\n}\n'
    assert read_dot(text) == ({"run_b", "a_shard"}, {("a_shard", "run_b")})
