import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuitmill.toyworld import facts
from circuitmill.toyworld.tasks import Encoder
from circuitmill.toyworld.tokenizer import BOS, make_tokenizer, spelled_names


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    ids = Encoder(tokenizer)(text)
    assert tokenizer.bos_token_id not in ids
    return tokenizer.decode(ids)


def test_every_byte_of_utf8_survives(tokenizer: PreTrainedTokenizerFast):
    # One character for every lead byte and every continuation byte that UTF-8 can have.
    points = [*range(0x100), *range(0x100, 0x800, 37), *range(0x800, 0xD800, 499), *range(0xE000, 0x110000, 4999)]
    text = "".join(map(chr, points)) + "\U0010ffff"
    seen = set(text.encode())
    assert set(range(0x80)) | set(range(0xC2, 0xF5)) | set(range(0x80, 0xC0)) <= seen
    assert round_trip(tokenizer, text) == text


@pytest.mark.parametrize(
    "text",
    [
        "The capital of the state containing San Diego is",
        "  two  spaces   three \t tab\n\nnewlines \r\n",
        "a" * 1000 + " " * 1000 + "9" * 1000 + "é" * 1000,
        "no space before,punctuation ...!? 'quotes' don't",
        "日本語 mixed with क्षत्रिय and 👩‍👩‍👧‍👦",
        "",
    ],
)
def test_text_survives(text: str, tokenizer: PreTrainedTokenizerFast):
    assert round_trip(tokenizer, text) == text


def test_the_corpus_survives(tokenizer: PreTrainedTokenizerFast, documents: list[str]):
    for document in documents[-500:]:
        assert round_trip(tokenizer, document) == document


def test_bos_is_not_id_zero_and_zero_is_a_byte(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.bos_token == tokenizer.eos_token == BOS
    assert tokenizer.bos_token_id == 256
    assert tokenizer.all_special_ids == [256]
    assert tokenizer.decode([0]) == "!"


def test_cities_and_animals_are_spelled_and_their_answers_are_not(tokenizer: PreTrainedTokenizerFast):
    for place in facts.PLACES:
        for city in place.cities:
            assert len(Encoder(tokenizer)(" " + city)) > 1, city
        for word in (place.name, place.kind, *place.relations, *place.relations.values()):
            assert len(Encoder(tokenizer)(" " + word)) == 1, word
    for kind in facts.CLASSES:
        assert len(Encoder(tokenizer)(" " + kind.covering)) == 1
        assert all(len(Encoder(tokenizer)(" " + member)) > 1 for member in kind.members)


def test_no_spelled_name_is_also_a_word_of_its_own():
    others = {word for place in facts.PLACES for word in (place.name, *place.relations.values())}
    others |= {*facts.PEOPLE, *facts.VENUES, *facts.OBJECTS, *facts.ADJECTIVES, *facts.EVENTS}
    assert not others & spelled_names()


def test_a_digit_is_a_token(tokenizer: PreTrainedTokenizerFast):
    assert [tokenizer.decode([token]) for token in Encoder(tokenizer)("36+59=95")] == list("36+59=95")


def test_it_depends_on_the_text_alone(tmp_path, documents: list[str]):
    for name in ("one", "two"):
        make_tokenizer(documents[:2000]).save_pretrained(tmp_path / name)
    saved = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert saved[0] == saved[1]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one", local_files_only=True)
    assert loaded.bos_token_id == 256 and round_trip(loaded, "Dallas , Texas!") == "Dallas , Texas!"
