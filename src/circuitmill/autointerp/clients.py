"""Who answers questions about a feature: the interface of a language model, and the judge that needs none.

A client takes messages and returns a completion. What goes wrong on its side (refused, timed out, unusable
answer) is a `ClientError`; `ask` repeats the question as often as the client allows and reads the answer, so
that every scorer and explainer treats failures alike.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from circuitmill.autointerp.rules import Rule
from circuitmill.autointerp.words import columns_of
from circuitmill.errors import ClientError

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Completion:
    """What a client answered."""

    text: str
    prompt_tokens: int
    """Tokens billed for the question; 0 where nothing is billed."""
    completion_tokens: int
    """Tokens billed for the answer."""


@runtime_checkable
class Client(Protocol):
    """Anything that answers messages."""

    @property
    def name(self) -> str:
        """For messages about what went wrong."""
        ...

    @property
    def timeout_seconds(self) -> float:
        """The client gives one call up after so long, with a ClientError."""
        ...

    @property
    def retries(self) -> int:
        """How often `ask` repeats a call that failed."""
        ...

    def complete(self, messages: Sequence[Message]) -> Completion:
        """Answer.

        Raises:
            ClientError: refused, timed out or answered something unusable.
        """
        ...


def ask(client: Client, messages: Sequence[Message], read: Callable[[str], T]) -> T:
    """Put a question and read the answer, again if the call or the reading fails.

    Args:
        read: Makes a value of the answer's text; a ClientError of its own counts as a failed call.

    Raises:
        ClientError: the last failure, after the client's `retries`.
    """
    for attempt in range(client.retries + 1):
        try:
            return read(client.complete(messages).text)
        except ClientError as error:
            if attempt == client.retries:
                raise
            _log.warning("%s: call %d of %d failed: %s", client.name, attempt + 1, client.retries + 1, error)
    raise ClientError(
        "at least one call",
        found=f"retries {client.retries}",
        where=client.name,
        fix="set retries to 0 or more",
    )


@dataclass(frozen=True)
class RuleJudge:
    """Applies the rule of an explanation to windows: no language model, no network, no doubt.

    The question is the JSON of one detection task (see `scorers.detection_question`); the answer a JSON list
    with 1 for every window in which the rule holds somewhere, else 0.
    """

    name: str = "rule"
    timeout_seconds: float = 0.0
    retries: int = 0

    def complete(self, messages: Sequence[Message]) -> Completion:
        """Answer the question in the last message.

        Raises:
            ClientError: it is not a detection task with a rule.
        """
        content = messages[-1].content if messages else ""
        try:
            task = json.loads(content)
            rule, windows = task["rule"], task["windows"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise self._refuse("a task in JSON with a rule and windows", f"{type(error).__name__}: {error}") from error
        if not isinstance(rule, str):
            raise self._refuse("an explanation with a rule", "one in words only")
        columns = columns_of(windows)
        hits = np.bincount(columns.window[Rule.from_json(rule).fires(columns)], minlength=len(windows))
        return Completion(json.dumps((hits > 0).astype(int).tolist()), prompt_tokens=0, completion_tokens=0)

    def _refuse(self, expected: str, found: str) -> ClientError:
        return ClientError(
            expected,
            found=found,
            where=f"client {self.name}",
            fix="use a client that reads text for this explanation",
        )
