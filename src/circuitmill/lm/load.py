"""A language model and its tokenizer, from stage toyworld, a local folder or the Hugging Face hub.

The network is used for models whose configuration says `source: huggingface`, and for no others. Weights are
read from safetensors files only.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.lm.lens import LensModel, load_lens_model, read_lens_config

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A frozen model ready for inference, with what the stages need to know about it."""

    model: PreTrainedModel | LensModel
    tokenizer: PreTrainedTokenizerFast
    digest: str
    """SHA-256 over config.json and the weight files."""
    bos_id: int
    n_layers: int
    d_model: int
    d_vocab: int
    context: int
    """Longest sequence the model can take."""
    name: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def pretrained(self) -> PreTrainedModel:
        """The model, for what works with Hugging Face's models only.

        Raises:
            ConfigError: it is one of TransformerLens's own.
        """
        if isinstance(self.model, LensModel):
            raise ConfigError(
                "a model of source toyworld, huggingface or folder: only those can be traced",
                found="model.source transformer_lens",
                where=f"model.name: {self.name}",
                fix="leave out stage attribute, or use a model that Hugging Face has",
            )
        return self.model


EARLY = "-early"
"""End of the label of the embedded model that means its snapshot from early pretraining."""
_MISSING = {
    "toyworld": "run stage toyworld",
    EARLY: "run stage toyworld again",
    "folder": "give a folder written by save_pretrained",
    "transformer_lens": "give a folder written by circuitmill.lm.lens.save_lens_model",
}


def model_location(cfg: ModelConfig, toyworld: Path | None) -> str:
    """The folder or hub name that holds the model.

    Args:
        toyworld: Output folder of stage toyworld; needed for the embedded model only.

    Raises:
        UpstreamError: the embedded model is asked for without its stage's output.
        ConfigError: the folder is not there.
    """
    if cfg.source == "huggingface":
        return cfg.name
    if cfg.source == "toyworld":
        if toyworld is None:
            raise UpstreamError(
                "the output of stage toyworld for the embedded model",
                found="none",
                where="--toyworld",
                fix="pass the manifest of stage toyworld, or choose another model",
            )
        folder = toyworld / ("early" if cfg.name.endswith(EARLY) else "model")
    else:
        folder = Path(cfg.name)
    if not (folder / "config.json").is_file():
        early = cfg.source == "toyworld" and cfg.name.endswith(EARLY)
        raise ConfigError(
            "a model folder with config.json",
            found="none",
            where=f"model.name: {folder}",
            fix=_MISSING[EARLY if early else cfg.source],
        )
    return str(folder)


def _arguments(cfg: ModelConfig) -> dict:
    if cfg.source == "huggingface":
        return {"revision": cfg.revision}
    return {"local_files_only": True}


def _refuse(what: str, error: Exception, location: str) -> ConfigError:
    return ConfigError(
        f"{what} that transformers can load",
        found=f"{type(error).__name__}: {error}",
        where=f"model.name: {location}",
        fix="check name and revision, and that there are config.json, *.safetensors and tokenizer.json",
    )


def load_config(cfg: ModelConfig, *, toyworld: Path | None) -> object:
    """The model's own configuration (shape, context, special tokens) without its weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    location = model_location(cfg, toyworld)
    if cfg.source == "transformer_lens":
        return SimpleNamespace(**read_lens_config(Path(location)))
    try:
        return AutoConfig.from_pretrained(location, **_arguments(cfg))
    except (OSError, ValueError) as error:
        raise _refuse("a configuration", error, location) from error


def load_tokenizer(cfg: ModelConfig, *, toyworld: Path | None) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its BOS token set.

    Tokenizers without a BOS of their own (Qwen's) get the one that the model's configuration names.

    Raises:
        ConfigError: it cannot be loaded, is not fast, or neither it nor the model has a BOS token.
    """
    location = model_location(cfg, toyworld)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **_arguments(cfg))
    except (OSError, ValueError) as error:
        raise _refuse("a tokenizer", error, location) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            "a fast tokenizer (tokenizer.json)",
            found=type(tokenizer).__name__,
            where=f"model.name: {location}",
            fix="convert it with transformers and save it beside the model",
        )
    if tokenizer.bos_token_id is None:
        bos = getattr(load_config(cfg, toyworld=toyworld), "bos_token_id", None)
        if bos is None:
            raise ConfigError(
                "a BOS token, which stands in front of every sequence",
                found="none in the tokenizer or in config.json",
                where=f"model.name: {location}",
                fix="set bos_token in tokenizer_config.json",
            )
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bos)
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokenizer's definition and its BOS id: equal digests give equal token ids."""
    text = f"{tokenizer.bos_token_id}\n{tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(text.encode()).hexdigest()


def context_of(config: object) -> int:
    """Longest sequence a model with this configuration can take.

    Raises:
        ConfigError: the configuration does not say.
    """
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    raise ConfigError(
        "max_position_embeddings in the model's config.json",
        found="none",
        where="model.name",
        fix="add the key: the longest sequence that the model was trained on",
    )


def load_language_model(cfg: ModelConfig, *, toyworld: Path | None, device: torch.device) -> LanguageModel:
    """Load a model for inference: evaluation mode, no gradients, in the precision of the configuration.

    Weights go to the device one by one, in that precision: the host never holds the whole model unless it is
    the device.

    Args:
        toyworld: Output folder of stage toyworld; needed for the embedded model only.

    Raises:
        ConfigError: model or tokenizer cannot be loaded.
        StoreError: a weight file is damaged.
        UpstreamError: the embedded model is asked for without its stage's output.
    """
    location = model_location(cfg, toyworld)
    tokenizer = load_tokenizer(cfg, toyworld=toyworld)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    if cfg.source == "transformer_lens":
        model = load_lens_model(Path(location), dtype=dtype, device=device)
        config = model.hooked.cfg
        sizes = (config.n_layers, config.d_model, config.d_vocab)
    else:
        model = _load_pretrained(cfg, location, dtype, device)
        config = model.config.get_text_config()
        sizes = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    n_layers, d_model, d_vocab = (int(size) for size in sizes)
    language_model = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        digest=_model_digest(cfg, location),
        bos_id=int(tokenizer.bos_token_id),  # pyright: ignore[reportArgumentType]
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=d_vocab,
        context=context_of(config),
        name=cfg.name,
    )
    _log.info(
        "model %s: %d layers, d_model %d, %s on %s",
        cfg.name,
        language_model.n_layers,
        language_model.d_model,
        cfg.dtype,
        device,
    )
    return language_model


def _load_pretrained(cfg: ModelConfig, location: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    arguments = {"dtype": dtype, "use_safetensors": True, "device_map": {"": device}, **_arguments(cfg)}
    try:
        config = AutoConfig.from_pretrained(location, **_arguments(cfg))
        if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
            # transformers' default attention leaves the soft cap out without a word (Gemma 2)
            arguments["attn_implementation"] = "eager"
        model = AutoModelForCausalLM.from_pretrained(location, **arguments)
    except SafetensorError as error:
        raise StoreError(
            "whole safetensors files",
            found=str(error),
            where=location,
            fix="rerun stage toyworld" if cfg.source == "toyworld" else "copy or download the model again",
        ) from error
    except (OSError, ValueError) as error:
        raise _refuse("a model", error, location) from error
    return model.eval().requires_grad_(False)


def _model_digest(cfg: ModelConfig, location: str) -> str:
    if cfg.source == "huggingface":
        config_file = cached_file(location, "config.json", revision=cfg.revision)
        folder = Path(str(config_file)).parent
    else:
        folder = Path(location)
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")], key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def require_tokenizer(lm: LanguageModel, digest: str, bos_id: int) -> None:
    """Refuse tokens that another tokenizer made.

    Args:
        lm: The model that is to read them.
        digest: `tokenizer_digest` of the tokenizer that made them.
        bos_id: Its BOS token.

    Raises:
        ConfigError: it is not the model's.
    """
    found = tokenizer_digest(lm.tokenizer)
    if (found, lm.bos_id) != (digest, bos_id):
        raise ConfigError(
            f"the tokenizer that made the token store ({digest[:12]}, BOS {bos_id})",
            found=f"{found[:12]}, BOS {lm.bos_id}",
            where=f"model.name: {lm.name}",
            fix="tokenize again with this model's tokenizer",
        )
