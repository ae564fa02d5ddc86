"""The one place that touches circuit-tracer 0.5.0 and TransformerLens.

A replacement model is built around a Hugging Face model and a cross-layer transcoder in a local folder,
checked against the original's logits, and traced. Nothing here asks a hub for anything. What the library gets
wrong is repaired in subclasses, never by changing the library's own objects:

| wrong in 0.5.0 | here |
|---|---|
| reconstruction ends at the last active position | `RepairedTranscoder.compute_reconstruction` |
| no active feature on the prompt: a crash | `RepairedTranscoder.select_decoder_vectors` refuses |
| token id 0 taken for "no BOS" | `LocalReplacementModel.ensure_tokenized` takes ids and adds nothing |
| skip weights in a CLT's files silently ignored | `load_transcoder` refuses the folder |
| stray or missing layer files change the number of layers | `load_transcoder` refuses the folder |
| `get_activations` zeroes the first of a batch | `LocalReplacementModel.get_activations` takes one prompt |
| a gradient row gathered per decoder: most of the time | `GroupedContext`, the same sums as matrix products |
| destructor fails at interpreter exit | `LocalReplacementModel.__del__` |

Error-node ids, the index of graphs, list scans and the server are not used: `export` and `stores.graphs`
write the files. The nnsight backend is never imported.
"""

import copy
import logging
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.attribution.context_transformerlens import AttributionContext
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitmill.errors import ConfigError, ShapeError, StoreError, UpstreamError
from circuitmill.graphs.architectures import hooked_config
from circuitmill.graphs.graph import AttributionGraph, Target

logging.getLogger("circuit_tracer").setLevel(logging.WARNING)

BATCH = 32
"""Graph rows per backward pass. The fastest on a CPU; larger gathers cost more than they save."""
LOGIT_TOLERANCE = 1e-4
"""Largest difference from the original's logits, relative to the largest logit (or 1)."""


class RepairedTranscoder(CrossLayerTranscoder):
    """circuit-tracer's CLT, also for prompts whose last tokens have no active feature."""

    @classmethod
    def of(cls, loaded: CrossLayerTranscoder) -> "RepairedTranscoder":
        """The same weights in this class."""
        with torch.device("meta"):
            repaired = cls(
                loaded.n_layers,
                loaded.d_transcoder,
                loaded.d_model,
                activation_function="jump_relu" if isinstance(loaded.activation_function, JumpReLU) else "relu",
                lazy_decoder=loaded.lazy_decoder,
                feature_input_hook=loaded.feature_input_hook,
                feature_output_hook=loaded.feature_output_hook,
                scan=loaded.scan,
                dtype=loaded.dtype,
                clt_path=loaded.clt_path,
            )
        repaired.load_state_dict(loaded.state_dict(), assign=True)
        return repaired

    def select_decoder_vectors(self, features: Tensor) -> tuple[Tensor, ...]:
        """As in the library.

        Raises:
            UpstreamError: no feature is active.
        """
        sparse = features if features.is_sparse else features.to_sparse()
        if sparse._nnz() == 0:
            raise UpstreamError(
                "a feature of the transcoder that is active on the prompt",
                found="none at any layer or position",
                where=self.clt_path,
                fix="train longer or with a smaller sparsity coefficient, or use another prompt",
            )
        return super().select_decoder_vectors(sparse)

    def compute_reconstruction(
        self, pos_ids: Tensor, layer_ids: Tensor, decoder_vectors: Tensor, input_acts: Tensor | None = None
    ) -> Float[Tensor, "layer pos d_model"]:
        """Sum the decoder vectors by layer and position, for every position of the prompt."""
        n_pos = int(pos_ids.max()) + 1 if input_acts is None else input_acts.shape[1]
        total = decoder_vectors.new_zeros(self.n_layers, n_pos, self.d_model)
        return total.index_put_((layer_ids, pos_ids), decoder_vectors, accumulate=True) + self.b_dec[:, None]


class GroupedContext(AttributionContext):
    """Contract gradients with decoders one position at a time.

    einsum(grads[:, positions], vectors, "batch position d_model, position d_model -> position batch") first
    copies one gradient row per active decoder. Decoders of one position share their row, so it is a matrix
    product per position.
    """

    @classmethod
    def of(cls, context: AttributionContext) -> "GroupedContext":
        """The same prompt in this class."""
        names = (
            "activation_matrix",
            "error_vectors",
            "token_vectors",
            "decoder_vecs",
            "encoder_vecs",
            "logits",
        )
        maps = ("encoder_to_decoder_map", "decoder_locations")
        return cls(**{name: getattr(context, name) for name in names + maps})

    def _compute_score_hook(
        self,
        hook_name: str,
        output_vecs: Tensor,
        write_index: Any,
        read_index: Any = slice(None),
    ) -> tuple[str, Callable]:
        if not isinstance(read_index, tuple):
            return super()._compute_score_hook(hook_name, output_vecs, write_index, read_index)
        positions, owner = read_index[1], weakref.proxy(self)
        here = [(pos, (positions == pos).nonzero().squeeze(1)) for pos in positions.unique().tolist()]
        blocks = [(pos, output_vecs[rows], write_index[rows]) for pos, rows in here]

        def contract(grads: Tensor, hook: object) -> None:
            grads = grads.to(output_vecs.dtype)
            for pos, vectors, rows in blocks:
                owner._batch_buffer.index_add_(0, rows, vectors @ grads[:, pos].T)

        return hook_name, contract


class LocalReplacementModel(TransformerLensReplacementModel):
    """circuit-tracer's replacement model, for token ids that begin with BOS."""

    def ensure_tokenized(self, prompt: Tensor) -> Int[Tensor, " pos"]:
        """Token ids as they are: the caller puts BOS in front, and an id of 0 is an id like any other.

        Raises:
            ShapeError: not the ids of one prompt of at least two tokens.
        """
        if prompt.ndim != 1 or len(prompt) < 2:
            raise ShapeError(
                "the token ids of one prompt, BOS and at least one more",
                found=f"shape {tuple(prompt.shape)}",
                where="prompt",
                fix="encode one prompt with graphs.prompts.encode",
            )
        return prompt.to(self.cfg.device)

    def setup_attribution(self, inputs: Tensor) -> GroupedContext:
        """Activations and error vectors of the prompt."""
        return GroupedContext.of(super().setup_attribution(inputs))

    def get_activations(
        self, inputs: Tensor, sparse: bool = False, apply_activation_function: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits and feature activations of one prompt; the library is wrong on a batch."""
        return super().get_activations(self.ensure_tokenized(inputs), sparse, apply_activation_function)

    def set_feature(
        self, ids: Int[Tensor, " pos"], layer: int, pos: int, feature: int, value: float
    ) -> tuple[Float[Tensor, "1 pos d_vocab"], Float[Tensor, "layer pos feature"]]:
        """Logits and pre-activations with a feature at a value and attention, norms and MLPs frozen."""
        logits, activations = self.feature_intervention(
            self.ensure_tokenized(ids),
            [(layer, pos, feature, value)],
            constrained_layers=range(self.cfg.n_layers),
            apply_activation_function=False,
        )
        return logits, cast(Tensor, activations)

    def __del__(self) -> None:
        """Release hooks, unless the interpreter is already taking the library apart."""
        if not sys.is_finalizing():
            super().__del__()


def load_transcoder(folder: Path, device: torch.device, n_layers: int) -> RepairedTranscoder:
    """Load a CLT in circuit-tracer's layout, in float32, leaving decoders on disk until a feature needs them.

    Args:
        n_layers: Layers of the language model; the files must be those of as many.

    Raises:
        StoreError: config.yaml or a layer's file is missing or damaged, there are files of other layers, or
        there are
            skip weights, which the library would silently ignore.
    """
    wanted = {f"{kind}_{layer}.safetensors" for kind in ("W_enc", "W_dec") for layer in range(n_layers)}
    found = {path.name for path in folder.glob("W_*.safetensors")}
    fix = "train the transcoder again, or export it without what circuit-tracer cannot represent"
    if found != wanted or not (folder / "config.yaml").is_file():
        raise StoreError(
            f"config.yaml and W_enc and W_dec files of {n_layers} layers",
            found=", ".join(sorted(path.name for path in folder.glob("*"))) or "an empty or missing folder",
            where=folder,
            fix=fix,
        )
    for name in sorted(wanted):
        layer = name.removesuffix(".safetensors").rsplit("_", 1)[1]
        known = {f"{tensor}_{layer}" for tensor in ("W_enc", "b_enc", "b_dec", "threshold", "W_dec")}
        try:
            with safe_open(folder / name, framework="pt") as file:
                unknown = set(file.keys()) - known
        except SafetensorError as error:
            raise StoreError("a safetensors file", found=str(error), where=folder / name, fix=fix) from error
        if unknown:
            raise StoreError(
                "only encoder, decoder, bias and threshold tensors",
                found=", ".join(sorted(unknown)),
                where=folder / name,
                fix=fix,
            )
    # an absolute path is what the loader takes for an already downloaded repository
    loaded, _ = load_transcoder_from_hub(str(folder.resolve()), device=device, dtype=torch.float32, lazy_decoder=True)
    if not isinstance(loaded, CrossLayerTranscoder):
        raise StoreError("model_kind cross_layer_transcoder", found=type(loaded).__name__, where=folder, fix=fix)
    return RepairedTranscoder.of(loaded)


def replacement_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, transcoder: Path, probe: Int[Tensor, " pos"]
) -> LocalReplacementModel:
    """Build a replacement model and compare its logits with the original's.

    Args:
        model: In float32; its weights are copied.
        transcoder: Folder of a CLT in circuit-tracer's layout.
        probe: Token ids to compare on; the replacement model takes prompts of at most this length.

    Raises:
        ConfigError: the architecture is not supported, or its conversion does not give the original's logits.
        StoreError: as `load_transcoder`.
        ShapeError: the transcoder's width is not the model's.
    """
    fields, converter = hooked_config(model.config)
    clt = load_transcoder(transcoder, model.device, fields["n_layers"])
    if clt.d_model != fields["d_model"]:
        raise ShapeError(
            f"a transcoder for d_model {fields['d_model']}",
            found=f"d_model {clt.d_model}",
            where=transcoder,
            fix="use the transcoder that was trained on this model",
        )
    config = HookedTransformerConfig(
        **fields, n_ctx=len(probe), device=str(model.device), dtype=torch.float32, init_weights=False
    )
    replaced = cast(LocalReplacementModel, LocalReplacementModel.from_config(config, clt))
    # TransformerLens would reopen the tokenizer by name and change its special tokens
    replaced.tokenizer = copy.deepcopy(tokenizer)
    replaced.tokenizer.padding_side = "right"
    with torch.no_grad():
        _load_weights(replaced, getattr(weight_conversions, converter)(model, config))
    _compare_logits(replaced, model, probe)
    return replaced


def _load_weights(replaced: LocalReplacementModel, weights: dict[str, Tensor]) -> None:
    """Fill in the weights. Every MLP and the unembedding have been wrapped, which moved their keys."""
    moved = {
        key.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): tensor
        for key, tensor in weights.items()
    }
    report = replaced.load_state_dict(moved, strict=False)
    buffers = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos", ".b_U")
    lost = [key for key in report.missing_keys if not key.startswith("transcoders.") and not key.endswith(buffers)]
    if lost or report.unexpected_keys:
        raise ConfigError(
            "a converter that fills every weight",
            found=f"left out {lost[:4]}, unknown {report.unexpected_keys[:4]}",
            where="model.name",
            fix="correct the model type's row in circuitmill/graphs/architectures.py",
        )


@torch.no_grad()
def _compare_logits(replaced: LocalReplacementModel, model: PreTrainedModel, probe: Int[Tensor, " pos"]) -> None:
    ids = probe.to(model.device)[None]
    wanted, found = model(ids).logits.float(), replaced(ids)
    gap = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    if not gap <= LOGIT_TOLERANCE:
        raise ConfigError(
            f"logits equal to the original model's within {LOGIT_TOLERANCE:g}",
            found=f"a relative difference of {gap:.2g}",
            where=f"model.name (model type {model.config.model_type})",
            fix="something about this model is not carried over; see circuitmill/graphs/architectures.py",
        )


def trace(
    replaced: LocalReplacementModel,
    ids: Int[Tensor, " pos"],
    *,
    prompt: str,
    max_logits: int,
    logit_mass: float,
    max_feature_nodes: int,
) -> AttributionGraph:
    """Trace one prompt.

    Args:
        ids: BOS first.
        prompt: The text, for display.
        max_logits: Most logit nodes.
        logit_mass: Take the most probable next tokens until their probabilities reach this.
        max_feature_nodes: Keep the features with the most influence on the logits.

    Raises:
        UpstreamError: no feature is active on the prompt.
        ShapeError: fewer than two tokens.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        found = attribute(
            replaced.ensure_tokenized(ids),
            replaced,
            max_n_logits=min(max_logits, replaced.cfg.d_vocab),
            desired_logit_prob=logit_mass,
            batch_size=BATCH,
            max_feature_nodes=max_feature_nodes,
        )
    probabilities = found.logit_probabilities.tolist()
    selected, targets = found.selected_features, found.logit_token_ids.tolist()
    features, activations = found.active_features[selected].cpu(), found.activation_values[selected].cpu()
    tokens, tokenizer = tuple(ids.tolist()), cast(PreTrainedTokenizerBase, replaced.tokenizer)
    return AttributionGraph(
        prompt=prompt,
        tokens=tokens,
        token_texts=tuple(tokenizer.decode([token]) for token in tokens),
        n_layers=replaced.cfg.n_layers,
        n_active=len(found.active_features),
        features=features,
        activations=activations,
        targets=tuple(
            Target(target.vocab_idx, target.token_str, probability)
            for target, probability in zip(found.logit_targets, probabilities, strict=True)
        ),
        adjacency=found.adjacency_matrix,
        unattributed=_unattributed(replaced, ids, features, activations, targets, found.adjacency_matrix),
    )


@torch.no_grad()
def _unattributed(
    replaced: LocalReplacementModel,
    ids: Int[Tensor, " pos"],
    features: Int[Tensor, "feature 3"],
    activations: Float[Tensor, " feature"],
    targets: list[int],
    adjacency: Float[Tensor, "node node"],
) -> Float[Tensor, " node"]:
    """The linear part of each feature's pre-activation and of each logit, less the row's sum.

    A feature's activation is its pre-activation, W_enc x + b_enc; a logit node stands for the final residual
    times the unembedding column less the mean column.
    """
    residual: list[Tensor] = []
    replaced.run_with_hooks(
        ids.to(replaced.cfg.device),
        fwd_hooks=[("unembed.hook_pre", lambda acts, hook: residual.append(acts[0, -1]))],
    )
    columns = replaced.unembed_proj[:, targets] - replaced.unembed_proj.mean(dim=1, keepdim=True)
    layers, _, index = features.T
    linear = torch.zeros(len(adjacency))
    linear[: len(features)] = activations - replaced.transcoders.get_parameter("b_enc").cpu()[layers, index]
    linear[len(adjacency) - len(targets) :] = (residual[0] @ columns).cpu()
    return linear - adjacency.sum(dim=1)
