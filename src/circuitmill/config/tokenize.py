"""Options of stage tokenize."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError

FILE_TYPES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
"""Endings of the text files that can be read."""


def _require(good: bool, expected: str, found: object, key: str, fix: str) -> None:
    if not good:
        raise ConfigError(expected, found=repr(found), where=f"tokenize.{key}", fix=fix)


@dataclass(frozen=True)
class TokenizeConfig:
    """Where the text comes from and how it is packed into sequences."""

    model: ModelConfig
    """The model whose tokenizer is used."""
    source: Literal["toyworld", "files", "huggingface"]
    """Text of stage toyworld, local files, or a data set on the Hugging Face hub (streamed)."""
    files: tuple[str, ...]
    """Source files: .txt, .jsonl, .jsonl.zst or .parquet, read in this order."""
    text_field: str
    """Field (.jsonl), column (.parquet) or feature (hub) that holds a document's text."""
    text_unit: Literal["line", "file"]
    """What one document of a .txt file is."""
    dataset: str
    """Hub data set; empty for other sources."""
    dataset_config: str
    """Configuration of the data set; empty for its default."""
    dataset_split: str
    """Split of the data set that is read."""
    dataset_revision: str
    """Commit, tag or branch of the data set."""
    network: bool
    """Whether the hub may be contacted for the text."""
    context: int
    """Tokens in a sequence, BOS included."""
    heldout_fraction: float
    """Share of documents, by hash of their text, that are held out; the embedded corpus has its own split."""
    max_train_tokens: int | None
    """Tokens after which the train split is full, rounded up to whole sequences; null takes all."""
    max_heldout_tokens: int | None
    """The same for the held-out split."""
    sequences_per_file: int
    """Sequences in one Parquet file, which is also the unit of resuming."""
    sequences_per_group: int
    """Sequences in one row group, the unit of reading."""
    documents_per_file: int
    """Documents in one file of the documents table."""
    keep_text: bool
    """Whether the documents table holds the text itself."""

    def __post_init__(self) -> None:
        _require(
            2 <= self.context < 2**15,
            "2 to 32,767 tokens",
            self.context,
            "context",
            "choose a context in range",
        )
        for key in ("sequences_per_file", "sequences_per_group", "documents_per_file"):
            _require(getattr(self, key) > 0, "a positive number", getattr(self, key), key, "raise it")
        for key in ("max_train_tokens", "max_heldout_tokens"):
            value = getattr(self, key)
            _require(value is None or value > 0, "a positive number or null", value, key, "raise it or set null")
        if self.source != "toyworld":
            _require(
                0 < self.heldout_fraction < 1,
                "a share above 0 and below 1",
                self.heldout_fraction,
                "heldout_fraction",
                "hold some documents out: evaluation needs them",
            )
        if self.source == "toyworld" and self.model.source != "toyworld":
            raise ConfigError(
                "model.source toyworld with the embedded corpus",
                found=f"model.source {self.model.source}",
                where="tokenize.source",
                fix="choose tokenize: files or huggingface, or model: toyworld",
            )

    def require_source(self) -> None:
        """Check what an option file leaves to the run: which files, and whether the hub may be contacted.

        Raises:
            ConfigError: no files, files of an unknown kind, or no permission or limit for the hub.
        """
        if self.source == "files":
            _require(bool(self.files), "at least one file", self.files, "files", "name the text files to read")
            for file in self.files:
                good = PurePath(file).name.endswith(FILE_TYPES)
                _require(good, f"a file ending in {', '.join(FILE_TYPES)}", file, "files", "convert or rename the file")
        if self.source == "huggingface":
            self._require_hub()

    def _require_hub(self) -> None:
        _require(bool(self.dataset), "a data set on the hub", self.dataset, "dataset", "name one")
        _require(
            self.network,
            "permission to contact the Hugging Face hub",
            self.network,
            "network",
            "set tokenize.network=true, or download the text and use tokenize: files",
        )
        _require(
            self.max_train_tokens is not None,
            "a limit for a streamed data set",
            self.max_train_tokens,
            "max_train_tokens",
            "say how many tokens to take",
        )
