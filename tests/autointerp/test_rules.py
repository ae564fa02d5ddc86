import json

import pytest

from circuitmill.autointerp.rules import Clause, Rule
from circuitmill.autointerp.words import columns_of
from circuitmill.errors import ClientError

TEXTS = ["<|endoftext|>", "The", " capital", " of", " Ohio", " and", " of", " Utah"]


def hits(*clauses: Clause) -> list[int]:
    fires = Rule(clauses).fires(columns_of([TEXTS]))
    return [token for token, hit in enumerate(fires) if hit]


def test_keys_of_a_clause_are_alternatives():
    assert hits(Clause(("prefix",), (("Ohio",), ("Utah",), ("Rome",)))) == [4, 7]


def test_all_columns_of_a_key_must_agree():
    assert hits(Clause(("back1", "prefix"), (("capital", "of"), ("the", "of")))) == [3]
    assert hits(Clause(("back2", "back1", "kind"), (("capital", "of", "capitalised word"),))) == [4]


def test_clauses_are_alternatives():
    assert hits(Clause(("prefix",), (("The",),)), Clause(("kind",), (("capitalised word",),))) == [1, 4, 7]


def test_the_start_of_a_text_is_a_context():
    assert hits(Clause(("back1",), (("",),))) == [1]


def test_special_tokens_never_fire():
    assert hits(Clause(("token",), (("<|endoftext|>",),))) == []


def test_a_rule_without_clauses_never_fires():
    assert hits() == []


def test_rules_survive_json():
    rule = Rule((Clause(("back1", "prefix"), (("von", '"'), ("", "é"))), Clause(("kind",), (("number",),))))
    assert Rule.from_json(rule.to_json()) == rule
    assert "\n" not in rule.to_json()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fires on cats", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ("{}", "KeyError"),
        ('{"format": 2, "clauses": []}', "format 2"),
        (json.dumps({"format": 1, "clauses": [{"columns": ["colour"], "keys": []}]}), "colour"),
        (json.dumps({"format": 1, "clauses": [{"columns": ["word", "kind"], "keys": [["a"]]}]}), "another number"),
    ],
)
def test_what_is_no_rule_is_refused(text, found):
    with pytest.raises(ClientError, match=found) as caught:
        Rule.from_json(text)
    assert "run stage interpret again" in str(caught.value)
