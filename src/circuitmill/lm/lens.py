"""Models that only TransformerLens has, from a local folder without pickles.

| file | content |
|---|---|
| config.json | a `HookedTransformerConfig` as a dictionary |
| model.safetensors | the `HookedTransformer`'s state dict; masks and rotary tables may be left out |
| tokenizer.json, tokenizer_config.json | a fast tokenizer with a BOS token |

`save_lens_model` writes such a folder. `LensModel` has the few attributes of a transformers model that this
package uses, so that capture and replacement need not know which of the two they have. TransformerLens is
imported where it is needed and only here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from circuitmill.errors import ConfigError, StoreError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_DERIVED = (".attn.mask", ".attn.IGNORE", ".attn.rotary_sin", ".attn.rotary_cos")
"""Buffers that the configuration determines."""
_OVERRIDDEN = (
    "device",
    "dtype",
    "seed",
    "tokenizer_name",
    "n_devices",
    "init_weights",
    "trust_remote_code",
    "n_params",
)
"""Settings that are not the model: a seed would reseed the process, a tokenizer's name would ask the hub for it."""
_SIZES = ("n_layers", "d_model", "d_vocab", "n_ctx")
_MLP_SETTINGS = (
    "act_fn",
    "eps",
    "experts_per_token",
    "gated_mlp",
    "norm_topk_prob",
    "normalization_type",
    "num_experts",
    "original_architecture",
)
_FIX = "write the folder with circuitmill.lm.lens.save_lens_model"


class LensModel(nn.Module):
    """A HookedTransformer behind the attributes of a transformers model that this package uses."""

    def __init__(self, hooked: nn.Module) -> None:
        super().__init__()
        self.hooked: Any = hooked

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the model runs in."""
        return self.hooked.cfg.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hooked.embed.W_E.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, first block first."""
        return list(self.hooked.blocks)

    @property
    def mlps(self) -> list[nn.Module]:
        """The MLP module of every block: after `ln2`, and before `ln2_post` where a model has it."""
        return [block.mlp for block in self.hooked.blocks]

    @property
    def mlp_settings(self) -> dict[str, Any]:
        """What decides the function of an MLP besides its weights."""
        return {key: getattr(self.hooked.cfg, key) for key in _MLP_SETTINGS}

    def base_model(self, input_ids: Int[Tensor, "sequence pos"], use_cache: bool = False) -> None:
        """Run the blocks, without the final norm and without logits."""
        self._no_cache(use_cache)
        self.hooked(input_ids, return_type=None, stop_at_layer=self.hooked.cfg.n_layers)

    def forward(self, input_ids: Int[Tensor, "sequence pos"], use_cache: bool = False) -> CausalLMOutput:
        """Logits, under the name by which transformers models give them."""
        self._no_cache(use_cache)
        return CausalLMOutput(logits=self.hooked(input_ids, return_type="logits"))

    def _no_cache(self, use_cache: bool) -> None:
        if use_cache:
            raise ConfigError("a pass over whole sequences", found="use_cache", where="LensModel", fix="leave it off")

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_U^T with the final norm's gain and centring folded in, in float32; see `hookpoints.unembedding`."""
        cfg = self.hooked.cfg
        folded = self.hooked.unembed.W_U.detach().to(torch.float32).T
        gain = getattr(getattr(self.hooked, "ln_final", None), "w", None)  # already folded into W_U if there is none
        if gain is not None:
            folded = folded * gain.detach().to(torch.float32)
        centred = cfg.normalization_type in ("LN", "LNPre") and not cfg.final_rms
        return folded - folded.mean(dim=1, keepdim=True) if centred else folded


def read_lens_config(folder: Path) -> dict[str, Any]:
    """The settings of a saved model.

    Raises:
        ConfigError: they are no HookedTransformerConfig, or of a model without MLPs.
    """
    path = folder / CONFIG
    expected = "a HookedTransformerConfig as a JSON object"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(expected, found=f"{type(error).__name__}: {error}", where=path, fix=_FIX) from error
    if not isinstance(settings, dict):
        raise ConfigError(expected, found=type(settings).__name__, where=path, fix=_FIX)
    wrong = [key for key in _SIZES if not isinstance(settings.get(key), int) or settings[key] < 1]
    if wrong:
        found = ", ".join(f"{key}: {settings.get(key)}" for key in wrong)
        raise ConfigError(f"{', '.join(_SIZES)} as whole numbers", found=found, where=path, fix=_FIX)
    if settings.get("attn_only"):
        raise ConfigError("a model with MLPs", found="attn_only", where=path, fix="use a model that has MLPs")
    if settings.get("load_in_4bit"):
        raise ConfigError("weights that are not quantised", found="load_in_4bit", where=path, fix=_FIX)
    return settings


def load_lens_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> LensModel:
    """Build the model on the device and fill it tensor by tensor.

    Raises:
        ConfigError: the settings make no model, or there is no safetensors file.
        StoreError: the file is damaged or holds other tensors than the model has.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = read_lens_config(folder)
    kept = {key: value for key, value in settings.items() if key not in _OVERRIDDEN}
    try:
        cfg = HookedTransformerConfig(**kept, device=str(device), dtype=dtype, init_weights=False)
        with torch.device(device):
            hooked = HookedTransformer(cfg, move_to_device=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            "settings that make a HookedTransformer",
            found=f"{type(error).__name__}: {error}",
            where=folder / CONFIG,
            fix=_FIX,
        ) from error
    _fill(hooked, folder / WEIGHTS)
    return LensModel(hooked).eval().requires_grad_(False)


def _fill(hooked: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"a model folder with {WEIGHTS}", found="none", where=path.parent, fix=_FIX)
    own = {name: tensor for name, tensor in hooked.state_dict().items() if not name.endswith(_DERIVED)}
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(_DERIVED)]  # noqa: SIM118
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            _require_same(found, {name: tuple(tensor.shape) for name, tensor in own.items()}, path)
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise StoreError(
            "a whole safetensors file", found=str(error), where=path, fix="copy the model again or " + _FIX
        ) from error


def _require_same(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise StoreError(
            f"the tensors of the model in {CONFIG}: {name} of shape {expected.get(name, 'none')}",
            found=f"shape {found.get(name, 'none')}, and {len(different) - 1} more differences",
            where=path,
            fix=_FIX,
        )


def save_lens_model(hooked: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a HookedTransformer as a folder for `model.source: transformer_lens`.

    What features read and write is what this very model has there: norms folded into the weights or weights
    that were centred stay so. Load with `from_pretrained_no_processing` to keep the published parameters.

    >>> from transformer_lens import HookedTransformer  # doctest: +SKIP
    >>> hooked = HookedTransformer.from_pretrained_no_processing("solu-4l")  # doctest: +SKIP
    >>> save_lens_model(hooked, hooked.tokenizer, Path("models/solu-4l"))  # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    tensors = {
        # copies, because safetensors refuses tensors that share memory
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in hooked.state_dict().items()
        if not name.endswith(_DERIVED)
    }
    temporary = folder / f".{WEIGHTS}.partial"
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    temporary.replace(folder / WEIGHTS)
    cfg: Any = hooked.cfg
    settings = {key: value for key, value in cfg.to_dict().items() if key not in _OVERRIDDEN}
    # the last file: a folder with it is complete
    (folder / CONFIG).write_text(
        json.dumps(settings, indent=1, sort_keys=True, default=_plain) + "\n", encoding="utf-8"
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item()
