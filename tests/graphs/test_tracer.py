"""The adapter, and every repair of circuit-tracer 0.5.0: the library fails, ours does not."""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from circuit_tracer.attribution import context_transformerlens
from circuit_tracer.replacement_model.common import ensure_tokenized
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError, StoreError, UpstreamError
from circuitmill.graphs import tracer
from circuitmill.graphs.graph import AttributionGraph
from circuitmill.graphs.tracer import (
    LocalReplacementModel,
    RepairedTranscoder,
    load_transcoder,
    replacement_model,
)
from circuitmill.stores.clt import save_clt

Build = Callable[..., LocalReplacementModel]
Trace = Callable[..., AttributionGraph]
CPU = torch.device("cpu")


@pytest.fixture
def transcoder_where(tmp_path: Path, make_transcoder: Callable[..., Transcoder]) -> Callable[..., Path]:
    """A random transcoder after a change to its parameters, as a folder."""

    def make(change: Callable[[Transcoder], None]) -> Path:
        transcoder = make_transcoder()
        with torch.no_grad():
            change(transcoder)
        save_clt(tmp_path / "clt", transcoder, scan="./data/features", model_name="tiny")
        return tmp_path / "clt"

    return make


def test_nodes_are_features_errors_embeddings_logits(neo_graph: AttributionGraph, prompt_ids: torch.Tensor) -> None:
    graph, n_pos = neo_graph, len(prompt_ids)
    assert graph.tokens == tuple(prompt_ids.tolist())
    assert graph.n_features == graph.n_active > 50
    assert graph.logits.stop == len(graph.adjacency) == graph.n_features + 3 * n_pos + n_pos + len(graph.targets)
    assert (graph.features[:, 1] > 0).all()  # BOS has no feature nodes
    assert (graph.adjacency[graph.errors] == 0).all()
    assert (graph.adjacency[graph.embeddings] == 0).all()
    layers = graph.features[:, 0]
    later = layers[None, :] >= layers[:, None]
    assert (graph.adjacency[: graph.n_features, : graph.n_features][later] == 0).all()
    probabilities = [target.probability for target in graph.targets]
    assert probabilities == sorted(probabilities, reverse=True)


def test_most_influential_features_are_kept(
    neo: LocalReplacementModel, prompt_ids: torch.Tensor, trace_ids: Trace
) -> None:
    full, capped = trace_ids(neo, prompt_ids), trace_ids(neo, prompt_ids, 20)
    assert capped.n_features == 20 < capped.n_active == full.n_active
    where = [full.features.tolist().index(feature) for feature in capped.features.tolist()]
    torch.testing.assert_close(capped.adjacency[:20, :20], full.adjacency[where][:, where], atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt_neo", "gpt2", "llama"])
def test_row_sums_and_unattributed_are_the_whole_linear_part(
    build: Build, prompt_ids: torch.Tensor, trace_ids: Trace, architecture: str
) -> None:
    """Pre-activation - b_enc = row sum + unattributed, and autograd agrees about which is which."""
    replaced = build(architecture)
    graph = trace_ids(replaced, prompt_ids)
    clt, keep = replaced.transcoders, {}

    def store(name: str) -> Callable:
        def hook(acts: torch.Tensor, hook: object) -> torch.Tensor:
            keep[name] = acts
            return acts

        return hook

    names = ["hook_embed", *[f"blocks.{i}.{replaced.feature_output_hook}" for i in range(3)]]
    names += [f"blocks.{i}.{replaced.feature_input_hook}" for i in range(3)]
    replaced.run_with_hooks(prompt_ids, fwd_hooks=[(name, store(name)) for name in names])
    embed, *outputs = (keep[name] for name in names[:4])
    for node in range(0, graph.n_features, 7):
        layer, pos, index = graph.features[node].tolist()
        linear = keep[names[4 + layer]][0, pos] @ clt.W_enc[layer, index]
        pre = (linear + clt.b_enc[layer, index]).item()
        assert pre == pytest.approx(graph.activations[node].item(), abs=1e-5)
        grads = torch.autograd.grad(linear, [embed, *outputs], retain_graph=True, allow_unused=True)
        held = (grads[0] * embed).sum()
        for target, grad in enumerate(grads[1:]):
            if grad is not None:  # all but the first token's MLP output and the decoder's bias has a node
                held = held + (grad[0, 1:] * (outputs[target][0, 1:] - clt.b_dec[target])).sum()
        assert graph.adjacency[node].sum().item() == pytest.approx(held.item(), abs=2e-5)
        assert graph.unattributed[node].item() == pytest.approx((linear - held).item(), abs=2e-5)


def test_unattributed_of_logits_completes_the_logit(
    neo: LocalReplacementModel, neo_graph: AttributionGraph, prompt_ids: torch.Tensor
) -> None:
    with torch.no_grad():
        logits = neo(prompt_ids)[0, -1]
    wanted = torch.stack([logits[target.token] - logits.mean() for target in neo_graph.targets])
    rows = neo_graph.logits
    found = neo_graph.adjacency[rows].sum(dim=1) + neo_graph.unattributed[rows]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (neo_graph.unattributed[neo_graph.errors] == 0).all()


def test_grouped_contraction_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
    neo: LocalReplacementModel,
    neo_graph: AttributionGraph,
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
) -> None:
    monkeypatch.delattr(tracer.GroupedContext, "_compute_score_hook")
    plain = trace_ids(neo, prompt_ids)
    torch.testing.assert_close(neo_graph.adjacency, plain.adjacency, atol=1e-6, rtol=1e-5)


def _silence_last(transcoder: Transcoder, model: LocalReplacementModel, ids: torch.Tensor) -> None:
    """Thresholds above every activation at the last position, where the others have some that are higher."""
    found: list[torch.Tensor] = []
    model.run_with_hooks(
        ids,
        fwd_hooks=[(f"blocks.{i}.mlp.hook_in", lambda acts, hook: found.append(acts[0])) for i in range(3)],
    )
    pre = transcoder.pre_activations(torch.stack(found, dim=1))
    transcoder.log_threshold.copy_(pre[-1].clamp(min=0.01).add(1e-3).log())


def test_last_token_without_active_feature(
    neo: LocalReplacementModel,
    build: Build,
    transcoder_where: Callable[..., Path],
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = transcoder_where(lambda transcoder: _silence_last(transcoder, neo, prompt_ids))
    replaced = build("gpt_neo", folder)
    graph = trace_ids(replaced, prompt_ids)
    assert graph.features[:, 1].max() < len(prompt_ids) - 1
    monkeypatch.delattr(RepairedTranscoder, "compute_reconstruction")
    with pytest.raises(RuntimeError, match="must match the size"):
        trace_ids(replaced, prompt_ids)


def test_no_active_feature_at_all_is_refused(
    build: Build,
    transcoder_where: Callable[..., Path],
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = transcoder_where(lambda transcoder: transcoder.log_threshold.fill_(20.0))
    replaced = build("gpt_neo", folder)
    with pytest.raises(UpstreamError, match="active on the prompt; found none"):
        trace_ids(replaced, prompt_ids)
    monkeypatch.delattr(RepairedTranscoder, "select_decoder_vectors")
    with pytest.raises(ValueError, match="non-empty list of Tensors"):
        trace_ids(replaced, prompt_ids)


def test_bos_with_id_zero(
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    transcoder_dir: Path,
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
) -> None:
    zero = AutoTokenizer.from_pretrained(
        tokenizer.name_or_path,
        bos_token="<|pad|>",
        eos_token=None,
        pad_token=None,
    )
    zero.eos_token = zero.pad_token = None
    assert zero.bos_token_id == 0
    with pytest.raises(StopIteration):
        ensure_tokenized("some text", zero, "cpu", "tiny")
    # not even special: the library would put another token in front
    ids = torch.cat([torch.tensor([0]), prompt_ids[1:]])
    added = ensure_tokenized(ids, tokenizer_without_pad(tokenizer), "cpu", "tiny")
    assert added.tolist() == [1, *ids.tolist()]
    replaced = replacement_model(make_model("gpt_neo"), zero, transcoder_dir, ids)
    assert trace_ids(replaced, ids).tokens == tuple(ids.tolist())
    replaced.tokenizer = tokenizer_without_pad(tokenizer)
    assert trace_ids(replaced, ids).tokens == tuple(ids.tolist())


def tokenizer_without_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.pad_token = None
    return other


def test_activations_take_one_prompt(neo: LocalReplacementModel, prompt_ids: torch.Tensor) -> None:
    batch = prompt_ids.repeat(2, 1)
    _, wrong = TransformerLensReplacementModel.get_activations(neo, batch)
    _, alone = neo.get_activations(prompt_ids)
    assert (wrong[:, 0] == 0).all() and (alone[:, 1:] > 0).any()  # the library's mistake
    with pytest.raises(ShapeError, match=r"one prompt.*found shape \(2, 11\)"):
        neo.get_activations(batch)


def test_prompt_of_one_token_is_refused(neo: LocalReplacementModel, trace_ids: Trace) -> None:
    with pytest.raises(ShapeError, match="BOS and at least one more"):
        trace_ids(neo, torch.tensor([1]))


def test_skip_weights_are_refused(transcoder_where: Callable[..., Path]) -> None:
    folder = transcoder_where(lambda transcoder: None)
    path = folder / "W_enc_1.safetensors"
    save_file({**load_file(path), "W_skip_1": torch.eye(16)}, path)
    assert load_clt(str(folder), device=CPU, dtype=torch.float32).W_skip is None  # the library loses them
    with pytest.raises(StoreError, match="W_skip_1") as caught:
        load_transcoder(folder, CPU, 3)
    assert str(path) in str(caught.value)


def test_file_of_another_layer_is_refused(transcoder_where: Callable[..., Path]) -> None:
    folder = transcoder_where(lambda transcoder: None)
    shutil.copy(folder / "W_dec_2.safetensors", folder / "W_dec_3.safetensors")
    with pytest.raises(StoreError, match="W_enc and W_dec files of 3 layers"):
        load_transcoder(folder, CPU, 3)
    (folder / "W_dec_3.safetensors").unlink()
    (folder / "W_enc_2.safetensors").unlink()
    with pytest.raises(StoreError, match="W_enc and W_dec files of 3 layers"):
        load_transcoder(folder, CPU, 3)


def test_truncated_file_is_named(transcoder_where: Callable[..., Path]) -> None:
    folder = transcoder_where(lambda transcoder: None)
    path = folder / "W_dec_1.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="a safetensors file") as caught:
        load_transcoder(folder, CPU, 3)
    assert str(path) in str(caught.value)


def test_transcoder_of_another_width_is_refused(
    make_model: Callable[[str], PreTrainedModel],
    make_transcoder: Callable[..., Transcoder],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    prompt_ids: torch.Tensor,
) -> None:
    save_clt(tmp_path, make_transcoder(d_model=8), scan="./data/features", model_name="tiny")
    with pytest.raises(ShapeError, match="d_model 16; found d_model 8"):
        replacement_model(make_model("gpt_neo"), tokenizer, tmp_path, prompt_ids)


def test_loaded_transcoder_is_ours(transcoder_dir: Path, make_transcoder: Callable[..., Transcoder]) -> None:
    loaded, ours = load_transcoder(transcoder_dir, CPU, 3), make_transcoder()
    assert isinstance(loaded, RepairedTranscoder) and loaded.lazy_decoder and loaded.dtype == torch.float32
    x = torch.randn(5, 3, 16)
    features = loaded.encode(x.transpose(0, 1))
    torch.testing.assert_close(features.transpose(0, 1), ours.encode(x))
    torch.testing.assert_close(loaded.decode(features).transpose(0, 1), ours.decode(ours.encode(x)), atol=1e-5, rtol=0)


def test_the_library_itself_is_untouched() -> None:
    stock = CrossLayerTranscoder.compute_reconstruction
    assert stock.__module__ == "circuit_tracer.transcoder.cross_layer_transcoder"
    assert context_transformerlens.AttributionContext._compute_score_hook.__module__ == context_transformerlens.__name__


def test_callers_tokenizer_is_not_changed(
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    transcoder_dir: Path,
    prompt_ids: torch.Tensor,
    trace_ids: Trace,
    neo_graph: AttributionGraph,
) -> None:
    left = AutoTokenizer.from_pretrained(tokenizer.name_or_path, padding_side="left")
    replaced = replacement_model(make_model("gpt_neo"), left, transcoder_dir, prompt_ids)
    torch.testing.assert_close(trace_ids(replaced, prompt_ids).adjacency, neo_graph.adjacency)
    assert left.padding_side == "left"


def test_nothing_holds_a_replacement_model_back(build: Build) -> None:
    import weakref

    reference = weakref.ref(build("gpt2"))
    gc.collect()
    assert reference() is None


def test_destructor_leaves_the_library_alone_at_exit(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(TransformerLensReplacementModel, "__del__", lambda model: released.append(id(model)))
    replaced = build("gpt2")
    with monkeypatch.context() as exiting:
        exiting.setattr(sys, "is_finalizing", lambda: True)
        replaced.__del__()
    assert id(replaced) not in released
    replaced.__del__()
    assert id(replaced) in released


def test_the_broken_backend_is_never_imported() -> None:
    assert "circuit_tracer" in sys.modules
    assert not [name for name in sys.modules if name.split(".")[0] == "nnsight"]
