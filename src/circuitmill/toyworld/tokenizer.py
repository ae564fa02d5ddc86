"""The tokenizer: one token per word, except for the names that the model must assemble from pieces.

City and animal names are spelled in pieces of two letters (greedy longest match), because with one token per
city the state could be read off the embedding and no MLP would have to compute it. Everything else is a word
of its own. Every byte is in the vocabulary, so nothing is unknown and decoding is exact.

Ids: 0-255 the bytes, 256 `<|endoftext|>` (BOS and end; circuit-tracer drops a BOS with id 0), then pieces,
then words by frequency.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitmill.toyworld import facts

BOS = "<|endoftext|>"
BOS_ID = 256
"""The first id after those of the bytes."""
PIECE = 2
"""Letters per piece of a spelled name."""

# Runs are bounded so that greedy matching stays fast and no text is long enough to become "unknown".
_WORDS = r" ?\p{L}{1,32}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s{1,16}"
_LONGEST = 33 * 4
"""Bytes of the longest stretch that `_WORDS` can match."""
_SPACE = "Ġ"
"""How the byte-level alphabet writes a space."""


def spelled_names() -> frozenset[str]:
    """The words that are spelled in pieces: all parts of city names, and the members of the classes."""
    cities = (word for place in facts.PLACES for city in place.cities for word in city.split())
    members = (member for kind in facts.CLASSES for member in kind.members)
    return frozenset(cities) | frozenset(members)


def _always_words() -> list[str]:
    """Words that are one token even if the corpus does not hold them: places and what is asked of them."""
    words = []
    for place in facts.PLACES:
        words += [place.name, place.kind, *place.relations, *place.relations.values()]
    for kind in facts.CLASSES:
        words += [kind.name, kind.covering, kind.part]
    return words


def make_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the vocabulary from the training text; a function of the documents."""
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    pre = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    counts = Counter(word for document in documents for word, _ in pre.pre_tokenize_str(document))
    counts.update(dict.fromkeys((_SPACE + word for word in _always_words()), 0))

    vocabulary: dict[str, int] = {}

    def add(token: str) -> None:
        vocabulary.setdefault(token, len(vocabulary))

    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        add(byte)
    add(BOS)
    spelled = spelled_names()
    for name in sorted(spelled):
        add(_SPACE + name[:PIECE])
        for start in range(0, len(name), PIECE):
            add(name[start : start + PIECE])
    for digit in "0123456789":
        add(_SPACE + digit)
    for word, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if word.removeprefix(_SPACE) not in spelled:
            add(word)

    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token=BOS, continuing_subword_prefix="", max_input_chars_per_word=_LONGEST)
    )
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        clean_up_tokenization_spaces=False,
    )
