"""Stage tokenize: documents in, fixed-length token sequences out.

| written | content |
|---|---|
| train/sequences-*.parquet, heldout/sequences-*.parquet | packed sequences (stores/tokens.py) |
| documents-*.parquet | where every document comes from, its split and length, its text if kept |

A document belongs to the train or held-out split by the SHA-256 of its text, so that neither a document nor a copy of
it is in both. The embedded corpus comes already split; copies of its training documents are dropped from the
held-out ones.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerFast

from circuitmill.config.tokenize import TokenizeConfig
from circuitmill.errors import ConfigError, StoreError
from circuitmill.lm.load import context_of, load_config, load_tokenizer, tokenizer_digest
from circuitmill.logs import Progress, progress
from circuitmill.stores.corpus import Document, read_documents, require_files
from circuitmill.stores.files import sha256_file
from circuitmill.stores.manifest import Manifest, StageOutput, load_upstreams
from circuitmill.stores.packing import Packer
from circuitmill.stores.token_writer import DocumentsWriter, SplitWriter
from circuitmill.stores.tokens import SPLITS

_log = logging.getLogger(__name__)
_BATCH = 1024
"""Documents handed to the tokenizer together."""
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class _Assigned:
    """A document with its number and the split it belongs to."""

    number: int
    document: Document
    sha: bytes
    split: str
    size: int
    """Bytes of text."""


class _Corpus:
    """All documents of a run, numbered and split; counts what it leaves out."""

    def __init__(self, cfg: TokenizeConfig, toyworld: Manifest | None) -> None:
        self._cfg, self.empty, self.duplicates = cfg, 0, 0
        self._files: list[tuple[Path, str, str | None]] = []
        if cfg.source == "toyworld" and toyworld is not None:
            self._files = [(toyworld.file(f"corpus/{split}.txt"), f"corpus/{split}.txt", split) for split in SPLITS]
        elif cfg.source == "files":
            self._files = [(path, str(path), None) for path in require_files(cfg.files)]

    def digests(self) -> dict[str, str]:
        """What the text is, by source, for the manifest."""
        cfg = self._cfg
        if cfg.source == "huggingface":
            return {"dataset": f"{cfg.dataset} {cfg.dataset_config} {cfg.dataset_split} {cfg.dataset_revision}"}
        return {source: sha256_file(path) for path, source, _ in self._files}

    def size(self) -> int:
        """About how many bytes of text will be read; for the progress bar."""
        cfg = self._cfg
        if cfg.source == "huggingface":
            return _BYTES_PER_TOKEN * ((cfg.max_train_tokens or 0) + (cfg.max_heldout_tokens or 0))
        # text packs about four to one
        return sum(path.stat().st_size * (4 if path.suffix == ".zst" else 1) for path, _, _ in self._files)

    def _documents(self) -> Iterator[tuple[Document, str | None]]:
        cfg = self._cfg
        if cfg.source == "huggingface":
            for document in _hub_documents(cfg):
                yield document, None
        for path, source, split in self._files:
            unit = cfg.text_unit if cfg.source == "files" else "line"
            for document in read_documents(path, source=source, unit=unit, field=cfg.text_field):
                yield document, split

    def __iter__(self) -> Iterator[_Assigned]:
        number, seen = 0, set()
        for document, fixed in self._documents():
            content = document.text.encode()
            if not content.strip():
                self.empty += 1
                continue
            sha = hashlib.sha256(content).digest()
            if fixed == "train":
                seen.add(sha)
            elif fixed == "heldout" and sha in seen:
                self.duplicates += 1
                continue
            yield _Assigned(number, document, sha, fixed or self._split_of(sha), len(content))
            number += 1

    def _split_of(self, sha: bytes) -> str:
        return SPLITS[int.from_bytes(sha[:8], "big") < self._cfg.heldout_fraction * 2**64]


def _hub_documents(cfg: TokenizeConfig) -> Iterator[Document]:
    # Imported here: it takes seconds, and only this source needs it.
    from datasets import load_dataset

    try:
        rows = load_dataset(
            cfg.dataset,
            cfg.dataset_config or None,
            split=cfg.dataset_split,
            revision=cfg.dataset_revision or None,
            streaming=True,
        )
        for row, entry in enumerate(rows):
            if cfg.text_field not in entry:
                raise ConfigError(
                    f"a feature {cfg.text_field!r} with the text",
                    found=", ".join(entry),
                    where=f"tokenize.text_field, data set {cfg.dataset}",
                    fix="name its feature",
                )
            yield Document(cfg.dataset, row, entry[cfg.text_field] or "")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "a data set that can be streamed from the Hugging Face hub",
            found=f"{type(error).__name__}: {error}",
            where=f"tokenize.dataset: {cfg.dataset}",
            fix="check name, configuration, split, revision and the network",
        ) from error


class _Encoder:
    """Text to token ids, in batches. Text that spells a special token is text like any other."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend, self._bos_id = tokenizer.backend_tokenizer, tokenizer.bos_token_id
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(self, items: list[_Assigned]) -> dict[int, Int32[np.ndarray, " token"]]:
        texts = [item.document.text for item in items]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        result = {}
        for item, encoding in zip(items, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            if (ids == self._bos_id).any():
                raise StoreError(
                    "text whose tokens do not include BOS, which separates documents",
                    found=f"BOS (id {self._bos_id}) at token {int((ids == self._bos_id).argmax())}",
                    where=f"{item.document.source}, row {item.document.row}",
                    fix="use a tokenizer that can spell every text, or remove the document",
                )
            result[item.number] = ids
        return result


def run(cfg: TokenizeConfig, *, toyworld: Path | None = None, out: Path) -> Manifest:
    """Tokenize, pack and split the corpus.

    Raises:
        ConfigError: the source is not there, the context does not fit the model, or a split has no sequences.
        StoreError: the text is damaged.
        UpstreamError: the output of stage toyworld is missing or stale.
    """
    cfg.require_source()
    upstreams = load_upstreams(toyworld=toyworld)
    world = upstreams.get("toyworld")
    folder = world.folder if world else None
    tokenizer = load_tokenizer(cfg.model, toyworld=folder)
    limit = context_of(load_config(cfg.model, toyworld=folder))
    if cfg.context > limit:
        raise ConfigError(
            f"at most {limit} tokens, the context of model {cfg.model.name}",
            found=str(cfg.context),
            where="tokenize.context",
            fix="lower it",
        )
    digest = tokenizer_digest(tokenizer)
    corpus = _Corpus(cfg, world)
    output = StageOutput("tokenize", cfg, upstreams, out, sources=corpus.digests())
    documents = DocumentsWriter(output, per_file=cfg.documents_per_file, keep_text=cfg.keep_text)
    splits = {split: _split_writer(cfg, output, split, int(str(tokenizer.bos_token_id))) for split in SPLITS}
    with progress("tokenizing", total=corpus.size(), unit="bytes") as bar:
        _write(corpus, _Encoder(tokenizer), documents, splits, bar)
    documents.finish()
    sequences = {split: writer.finish() for split, writer in splits.items()}
    _require_sequences(cfg, sequences, splits)
    return output.finish(
        {
            "context": cfg.context,
            "bos_id": tokenizer.bos_token_id,
            "d_vocab": len(tokenizer),
            "tokenizer_digest": digest,
            "sequences": sequences,
            "tokens": {split: writer.tokens for split, writer in splits.items()},
            "documents": {split: writer.documents for split, writer in splits.items()},
            "dropped_tokens": {split: writer.dropped for split, writer in splits.items()},
            "empty_documents": corpus.empty,
            "duplicate_documents": corpus.duplicates,
            "sequences_per_file": cfg.sequences_per_file,
            "documents_per_file": cfg.documents_per_file,
        }
    )


def _split_writer(cfg: TokenizeConfig, output: StageOutput, split: str, bos_id: int) -> SplitWriter:
    budget = cfg.max_train_tokens if split == "train" else cfg.max_heldout_tokens
    return SplitWriter(
        output,
        split,
        Packer(cfg.context, bos_id),
        context=cfg.context,
        max_sequences=None if budget is None else -(-budget // cfg.context),
        per_file=cfg.sequences_per_file,
        per_group=cfg.sequences_per_group,
    )


def _write(
    corpus: _Corpus, encode: _Encoder, documents: DocumentsWriter, splits: dict[str, SplitWriter], bar: Progress
) -> None:
    with closing(iter(corpus)) as items:  # type: ignore[type-var]
        while batch := list(islice(items, _BATCH)):
            needed = [item for item in batch if documents.needs(item.number) or splits[item.split].needs(item.number)]
            tokens = encode(needed)
            for item in batch:
                documents.advance(item.number)
                writer = splits[item.split]
                if not writer.takes(item.number):
                    continue
                writer.documents += 1
                if item.number in tokens and documents.needs(item.number):
                    documents.add(
                        {
                            "document": item.number,
                            "source": item.document.source,
                            "row": item.document.row,
                            "sha": item.sha,
                            "split": item.split,
                            "n_tokens": len(tokens[item.number]),
                            "text": item.document.text,
                        }
                    )
                if writer.needs(item.number):
                    writer.add(item.number, tokens[item.number])
            bar.advance(sum(item.size for item in batch))
            if all(writer.full for writer in splits.values()):
                return


def _require_sequences(cfg: TokenizeConfig, sequences: dict[str, int], splits: dict[str, SplitWriter]) -> None:
    for split, count in sequences.items():
        if count == 0:
            writer = splits[split]
            raise ConfigError(
                f"at least one sequence of {cfg.context} tokens in split {split}",
                found=f"{writer.documents} documents with {writer.dropped} tokens",
                where=f"tokenize, source {cfg.source}",
                fix="add text, lower tokenize.context, or change tokenize.heldout_fraction",
            )
