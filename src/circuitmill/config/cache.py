"""Options of stage cache."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.config.activations import Hookpoint, check_activations
from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class CacheConfig:
    """How many activations are stored, and in which form."""

    model: ModelConfig
    """The model whose activations are stored."""
    hookpoint: Hookpoint
    """Where in a block: mlp is the pair of what the MLP reads and writes; at the others what is read is what a
    transcoder reconstructs. mlp_in and mlp_out are the two ends of the MLP, attn_out what attention adds, resid_pre,
    resid_mid and resid_post the residual stream before, inside and after the block."""
    layers: tuple[int, ...] | None
    """Blocks whose hookpoint is stored, from 0, in both models if there are two; null is all. Not with mlp."""
    second_model: ModelConfig | None
    """Another model with the same tokenizer and d_model, run on the same tokens; its places follow the first's in the
    store, for a crosscoder over models. Not with mlp."""
    train_shards: int
    """Shards of the train split; each is one job."""
    heldout_shards: int
    """Shards of the held-out split."""
    train_tokens: int | None
    """Tokens of the train split to run on, BOS included, rounded up to whole sequences; null takes all."""
    heldout_tokens: int | None
    """The same for the held-out split."""
    batch_sequences: int
    """Sequences in one forward pass."""
    mode: Literal["disk", "stream"]
    """Stored in shards, or computed by the model while the transcoder trains."""
    targets: Literal["stored", "recomputed", "inputs"]
    """MLP outputs stored beside the inputs, or computed again from them by the trainer with the model's own MLPs; or,
    with every hookpoint but mlp, inputs: what is read is what is to be reconstructed."""
    codec: Literal["float32", "bf16", "int8", "int4", "int2", "entropy"]
    """Stored form of a number; `circuitmill.core.codecs` describes each."""
    bits: float
    """Size of a number with codec entropy, in bits, 1 to 7; fixed by the other codecs."""
    group_channels: int
    """Channels that share a scale (int8, int4, int2, entropy); must divide d_model, or be larger and then means all."""
    compression_level: int
    """Of zstd for what the codec leaves, 1 to 22; 0 stores it as it is. Codes of entropy are always compressed."""
    chunk_bytes: int
    """Least size of a checksummed chunk of codes, before compression."""
    chunks_per_file: int
    """Chunks in one file of a shard; a file is the unit of writing, of resuming and of shuffling."""

    def __post_init__(self) -> None:
        positive = (
            "train_shards",
            "heldout_shards",
            "batch_sequences",
            "group_channels",
            "chunk_bytes",
            "chunks_per_file",
        )
        for key in positive:
            self._require(getattr(self, key) > 0, "a positive number", key)
        for key in ("train_tokens", "heldout_tokens"):
            self._require(getattr(self, key) is None or getattr(self, key) > 0, "a positive number or null", key)
        self._require(0 <= self.compression_level <= 22, "a level from 0 to 22", "compression_level")
        self._require(1 <= self.bits <= 7, "1 to 7 bits", "bits")
        check_activations(self, "cache")
        pair = self.hookpoint == "mlp"
        self._require(
            (self.targets == "inputs") != pair,
            "stored or recomputed with hookpoint mlp"
            if pair
            else f"inputs with hookpoint {self.hookpoint}: what is read there is what is reconstructed",
            "targets",
        )

    def _require(self, good: bool, expected: str, key: str) -> None:
        if not good:
            raise ConfigError(expected, found=repr(getattr(self, key)), where=f"cache.{key}", fix="change the value")

    def units(self) -> tuple[str, ...]:
        """Names of the shards: split and number; none if activations are streamed."""
        if self.mode == "stream":
            return ()
        names = [f"train-{index:05d}" for index in range(self.train_shards)]
        return tuple(names + [f"heldout-{index:05d}" for index in range(self.heldout_shards)])

    def n_sequences(self, split: str, there: int, context: int) -> int:
        """Sequences of a split that its budget covers, the last one whole.

        Args:
            there: Sequences that the split of the token store has.
            context: Tokens in a sequence.

        Raises:
            ConfigError: the budget asks for more tokens than there are.
        """
        budget = {"train": self.train_tokens, "heldout": self.heldout_tokens}[split]
        wanted = there if budget is None else -(-budget // context)
        if wanted > there:
            raise ConfigError(
                f"at most {there * context} tokens in split {split} of the token store",
                found=f"a budget of {budget}",
                where=f"cache.{split}_tokens",
                fix="lower it, set null to take all, or tokenize more text",
            )
        return wanted

    def slices(self, sequences: dict[str, int], context: int) -> dict[str, tuple[str, int, int]]:
        """Which sequences each shard holds: shard -> (split, first, one past the last).

        Args:
            sequences: Sequences that each split of the token store has.
            context: Tokens in a sequence.

        Raises:
            ConfigError: a budget asks for more tokens than there are, or a shard would be empty.
        """
        result = {}
        for split, shards in (("train", self.train_shards), ("heldout", self.heldout_shards)):
            wanted = self.n_sequences(split, sequences[split], context)
            if wanted < shards:
                raise ConfigError(
                    f"at most {wanted} shards for {wanted} sequences of split {split}",
                    found=str(shards),
                    where=f"cache.{split}_shards",
                    fix="use fewer shards or more tokens",
                )
            for index in range(shards):
                name = f"{split}-{index:05d}"
                result[name] = (split, index * wanted // shards, (index + 1) * wanted // shards)
        return result
