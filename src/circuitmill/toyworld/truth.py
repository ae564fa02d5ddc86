"""What is true of the toy world, as `truth.json`: tasks with answers, circuits with the concepts they pass.

A circuit is a prompt, an answer and concepts. A concept has a name, words that a feature for it would be
explained by, and `after`: a span of the prompt that occurs once, from whose last token on the concept can be
computed and before which it cannot. That holds by construction of the text. That the model does compute the
place of a two-hop question at that very token is measured (`circuitmill.toyworld.measure`).
"""

from typing import Any

from circuitmill.toyworld.circuits import circuits
from circuitmill.toyworld.questions import BEYOND, all_tasks
from circuitmill.toyworld.world import World

FORMAT = 1


def truth(world: World) -> dict[str, Any]:
    """The content of truth.json."""
    return {
        "format": FORMAT,
        "tasks": {name: task for name, task in all_tasks(world).items() if name not in BEYOND},
        "circuits": circuits(world),
    }
