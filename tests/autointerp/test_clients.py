import json

import pytest

from circuitmill.autointerp.clients import Client, Completion, Message, RuleJudge, ask
from circuitmill.autointerp.rules import Clause, Rule
from circuitmill.errors import ClientError


class Flaky:
    """Fails a few times, then answers."""

    name, timeout_seconds = "flaky", 1.0

    def __init__(self, failures: int, retries: int) -> None:
        self.failures, self.retries, self.calls = failures, retries, 0

    def complete(self, messages):
        self.calls += 1
        if self.calls <= self.failures:
            raise ClientError("an answer", found=f"timeout {self.calls}", where="flaky", fix="wait")
        return Completion("7", 1, 1)


def test_the_judge_is_a_client():
    assert isinstance(RuleJudge(), Client)
    assert not isinstance(object(), Client)


def test_failed_calls_are_repeated(caplog):
    client = Flaky(failures=2, retries=2)
    with caplog.at_level("WARNING", logger="circuitmill.autointerp.clients"):
        assert ask(client, [Message("user", "?")], int) == 7
    assert client.calls == 3
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        "flaky: call 1 of 3 failed: an answer; found timeout 1",
        "flaky: call 2 of 3 failed: an answer; found timeout 2",
    ]


def test_the_last_failure_is_raised():
    with pytest.raises(ClientError, match="timeout 2"):
        ask(Flaky(failures=5, retries=1), [Message("user", "?")], int)


def test_an_answer_that_cannot_be_read_counts_as_a_failure():
    def read(text):
        raise ClientError("a letter", found=text, where="flaky", fix="ask again")

    client = Flaky(failures=0, retries=3)
    with pytest.raises(ClientError, match="a letter; found 7"):
        ask(client, [Message("user", "?")], read)
    assert client.calls == 4


def test_the_judge_applies_the_rule():
    rule = Rule((Clause(("prefix",), (("Dallas",),)),)).to_json()
    task = {"rule": rule, "windows": [[" in", " Da", "ll", "as"], [" as", " Da"], []]}
    completion = RuleJudge().complete([Message("system", "be brief"), Message("user", json.dumps(task))])
    assert completion == Completion("[1, 0, 0]", 0, 0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("what does it fire on?", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"windows": []}', "KeyError: 'rule'"),
        ('{"rule": null, "windows": []}', "one in words only"),
    ],
)
def test_the_judge_refuses_what_it_cannot_apply(content, found):
    with pytest.raises(ClientError, match=found) as caught:
        RuleJudge().complete([Message("user", content)])
    assert "use a client that reads text" in str(caught.value)
