"""Which language model a run works on; shared by every stage that loads it."""

from dataclasses import dataclass
from typing import Literal

from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model with one `mlp` module per block."""

    source: Literal["toyworld", "huggingface", "folder", "transformer_lens"]
    """Made by stage toyworld, on the Hugging Face hub, a local folder in Hugging Face's layout, or a local folder
    written by `circuitmill.lm.lens.save_lens_model`."""
    name: str
    """Hub name or folder; a label for the embedded model, whose snapshot from early pretraining is meant if the label
    ends in -early."""
    revision: str
    """Commit, tag or branch on the hub; empty for the other sources."""
    dtype: Literal["float32", "bfloat16"]
    """Precision the model runs in."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a model name", found="''", where="model.name", fix="name a hub model or a folder")
        if self.source == "huggingface" and not self.revision:
            raise ConfigError(
                "a revision for a model on the hub",
                found="''",
                where="model.revision",
                fix="give a commit hash, so that the run can be repeated, or 'main'",
            )
        if self.source != "huggingface" and self.revision:
            raise ConfigError(
                f"no revision for a model of source {self.source}",
                found=repr(self.revision),
                where="model.revision",
                fix="set model.revision to ''",
            )
