import pytest

from circuitmill.autointerp.words import COLUMNS, columns_of, kind_of

BOS = "<|endoftext|>"


def column(name: str, texts: list[str]) -> list[str]:
    columns = columns_of([texts])
    return [columns.value(name, token) for token in range(len(texts))]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([" El", " Pa", "so", ","], ["El", "Paso", ","]),
        ([" don", "'t", " go"], ["don't", "go"]),
        (["x", "1", "2", "+", "3"], ["x", "12", "+", "3"]),
        ([" caf", "<0xC3>", "<0xA9>", "."], ["café", "."]),
        (["東", "京", "は"], ["東", "京", "は"]),
        ([" a ", "b"], ["a", "b"]),
        ([BOS, "The"], [BOS, "The"]),
        (["(", "(", "\n", "A"], ["(", "(", "\n", "A"]),
    ],
)
def test_tokens_are_grouped_into_words(texts, words):
    columns = columns_of([[BOS, *texts]])
    starts = [token for token, nth in enumerate(columns.codes["nth"]) if nth == columns.code("1")][1:]
    assert [columns.value("word", token) for token in starts] == words


@pytest.mark.parametrize("text", [BOS, "<s>", "<bos>", "<|begin_of_text|>", "[SEP]"])
def test_special_tokens_are_known_by_their_form(text):
    assert kind_of(text) == "special token"


@pytest.mark.parametrize("text", [" <", "<", "<0xC3>", "[", "a<b>", "<|", " The"])
def test_other_tokens_are_not_special(text):
    assert kind_of(text) != "special token"


def test_kinds_of_word():
    kinds = ["Dallas", "TX", "A", "42", ".", "of", "\n", " ", "東"]
    assert [kind_of(word) for word in kinds] == [
        "capitalised word",
        "word in capitals",
        "capitalised word",
        "number",
        "punctuation",
        "lowercase word",
        "line break",
        "space",
        "ideograph",
    ]


def test_columns_of_a_word_in_pieces():
    texts = [BOS, "The", " capital", " of", " Da", "ll", "as"]
    assert column("token", texts)[-1] == "as"
    assert column("prefix", texts)[-3:] == ["Da", "Dall", "Dallas"]
    assert column("word", texts)[-3:] == ["Dallas"] * 3
    assert column("piece", texts)[-4:] == ["whole", "first", "middle", "last"]
    assert column("nth", texts)[-3:] == ["1", "2", "3"]
    assert [column(name, texts)[-1] for name in ("back1", "back2", "back3")] == ["of", "capital", "The"]
    assert column("place", texts)[1:5] == ["1", "2", "3", "4"]


def test_a_special_token_begins_a_new_text():
    texts = [BOS, " a", BOS, " b", " c"]
    assert column("back1", texts) == ["", "", "", "", "b"]
    columns = columns_of([texts])
    assert columns.codes["back1"][0] < 0 <= columns.codes["back1"][1]
    assert columns.usable.tolist() == [False, True, False, True, True]
    # What stands before the start of a text is not known, in contrast to the start itself.
    assert columns.codes["back2"][3] < 0 <= columns.codes["back2"][4]


def test_words_repeat_within_a_text_only():
    assert column("again", [BOS, " a", " b", " a", BOS, " a"])[1:] == ["new", "new", "repeated", "new", "new"]


def test_a_word_cut_off_by_the_window_is_not_known():
    columns = columns_of([["as", " is"], [" as", " is"], [",", " is"]])
    assert (columns.codes["prefix"] >= 0).tolist() == [False, True, True, True, True, True]
    assert columns.codes["back1"].tolist()[1] < 0
    assert columns.window.tolist() == [0, 0, 1, 1, 2, 2]


def test_no_windows_have_no_tokens():
    columns = columns_of([])
    assert columns.n_windows == 0
    assert set(columns.codes) == set(COLUMNS)
    assert columns.window.tolist() == []
