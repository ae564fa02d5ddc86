"""Stage evaluate on transcoders of every architecture and on other hookpoints than MLPs."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.stages.small_run import (
    D_MODEL,
    DEAD,
    N_FEATURES,
    N_LAYERS,
    RESID,
    make_cache,
    make_second_model,
    make_train,
    model_options,
    options,
    random_transcoder,
)

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.decode import decode
from circuitmill.config.evaluate import EvaluateConfig
from circuitmill.core.metrics import ExplainedVariance
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ShapeError
from circuitmill.stages import evaluate
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.manifest import Manifest, load_manifest


@pytest.fixture(scope="module")
def cfg(tiny_model_dir: Path) -> EvaluateConfig:
    plain = options("evaluate", "tiny", model=model_options(tiny_model_dir), max_tokens=None, max_one_layer_tokens=200)
    return decode(EvaluateConfig, plain, "evaluate")


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of MLPs."""
    return make_cache(tmp_path_factory.mktemp("upstreams"), tiny_model_dir)


FORMS = {
    "skip": {"topology": "plt", "skip": True},
    "molt": {"topology": "molt", "ranks": (3,)},
    "offsets": {"decoder": "target", "pair_scale": True, "pair_offset": True},
    "acausal": {"topology": "acausal"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_transcoder_of_mlps_is_measured_with_what_it_reads(
    cfg: EvaluateConfig, made: dict[str, Path], form: str, tmp_path: Path
) -> None:
    transcoder = random_transcoder(made["cache"], architecture=ArchitectureConfig(**FORMS[form]))
    train = make_train(tmp_path / "train", made["cache"], transcoder)
    manifest = evaluate.run(cfg, **made, train=train, out=tmp_path / "out")
    found = json.loads(manifest.file("evaluation.json").read_text())
    store = ActivationStore.open(load_manifest(made["cache"], "cache"))
    rows = store.read("heldout", 0, store.n_tokens("heldout"))
    explained = ExplainedVariance(N_LAYERS, D_MODEL)
    explained.update(rows.outputs, transcoder(rows.inputs))
    assert found["fit"]["explained_variance"] == pytest.approx(explained.pooled(), rel=1e-4)
    assert found["transcoder"]["topology"] == transcoder.architecture.topology
    assert found["places"] == ["mlp.0", "mlp.1"]
    if form == "acausal":
        assert_nothing_is_replaced(manifest, found, "topology acausal writes to layers that run before")
    else:
        assert found["unreplaceable"] is None and manifest.counts["kl"] > 0
        assert [row["layer"] for row in found["one_layer"]] == [0, 1]


def assert_nothing_is_replaced(manifest: Manifest, found: dict, reason: str) -> None:
    assert found["unreplaceable"].startswith(reason) and manifest.counts["unreplaceable"] == found["unreplaceable"]
    assert found["behaviour"] is found["one_layer"] is found["tasks"] is None
    assert manifest.counts["kl"] is manifest.counts["agreement"] is manifest.counts["tasks"] is None
    assert "plots/one_layer.svg" not in manifest.files and "plots/density.svg" in manifest.files
    layers = pq.read_table(manifest.file("layers.parquet"))
    assert layers.schema.field("kl").type == pa.float64() and layers["kl"].null_count == len(layers)


@pytest.fixture(scope="module")
def stream(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of the residual stream of two models."""
    folder = tmp_path_factory.mktemp("stream")
    second = make_second_model(folder / "second", tiny_model_dir)
    return make_cache(folder, tiny_model_dir, **RESID, second_model=model_options(second))


@pytest.mark.parametrize("models", [1, 2])
def test_a_crosscoder_is_measured_on_what_it_reads(
    cfg: EvaluateConfig, stream: dict[str, Path], tiny_model_dir: Path, models: int, tmp_path: Path
) -> None:
    paths = stream if models == 2 else make_cache(tmp_path, tiny_model_dir, **RESID)
    architecture = ArchitectureConfig(topology="crosscoder", models=models)
    transcoder = random_transcoder(paths["cache"], architecture=architecture)
    train = make_train(tmp_path / "train", paths["cache"], transcoder)
    manifest = evaluate.run(cfg, **paths, train=train, out=tmp_path / "out")
    found = json.loads(manifest.file("evaluation.json").read_text())
    assert_nothing_is_replaced(manifest, found, "topology crosscoder writes what it reads")
    n_places = N_LAYERS * models
    names = [f"{prefix}resid_post.{layer}" for prefix in ("", "second.")[:models] for layer in range(N_LAYERS)]
    assert found["places"] == names
    shape = {"n_layers": n_places, "n_sources": 1, "n_features": N_FEATURES, "d_model": D_MODEL}
    assert found["transcoder"] == {"topology": "crosscoder", **shape}
    # this cache is not quantised, so it holds what the live models compute
    store = ActivationStore.open(load_manifest(paths["cache"], "cache"))
    x = store.read("heldout", 0, store.n_tokens("heldout"), outputs=False).inputs
    explained = ExplainedVariance(n_places, D_MODEL)
    features = transcoder.encode(x)
    explained.update(x, transcoder.decode(features))
    assert found["fit"]["per_layer"]["explained_variance"] == pytest.approx(explained.per_layer().tolist(), rel=1e-4)
    assert found["sparsity"]["l0"] == pytest.approx(float((features > 0).sum() / len(x)), rel=1e-3)
    assert len(found["sparsity"]["per_layer"]["l0"]) == len(found["density_histogram"]["counts"]) == 1
    layers = pq.read_table(manifest.file("layers.parquet")).to_pydict()
    assert layers["layer"] == list(range(n_places)) and layers["l0"] == layers["dead"] == [None] * n_places
    rows = pq.read_table(manifest.file("features.parquet")).to_pydict()
    assert rows["layer"] == [0] * N_FEATURES and rows["n_active"][DEAD[1]] == 0


def test_autoencoders_of_some_layers_have_sparsity_by_layer(
    cfg: EvaluateConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    paths = make_cache(tmp_path, tiny_model_dir, hookpoint="attn_out", targets="inputs", layers=[1])
    transcoder = random_transcoder(paths["cache"], architecture=ArchitectureConfig(topology="sae"))
    train = make_train(tmp_path / "train", paths["cache"], transcoder)
    manifest = evaluate.run(cfg, **paths, train=train, out=tmp_path / "out")
    found = json.loads(manifest.file("evaluation.json").read_text())
    assert_nothing_is_replaced(manifest, found, "topology sae writes what it reads")
    assert found["places"] == ["attn_out.1"]
    assert pq.read_table(manifest.file("layers.parquet")).to_pydict()["l0"] == [found["sparsity"]["l0"]]


def test_a_crosscoder_of_other_places_is_refused(cfg: EvaluateConfig, stream: dict[str, Path], tmp_path: Path) -> None:
    transcoder = Transcoder(3, 4, D_MODEL, ArchitectureConfig(topology="crosscoder"))
    train = make_train(tmp_path / "train", stream["cache"], transcoder)
    with pytest.raises(ShapeError, match="of 4 layers and width 16, as the cache of resid_post of model .* and .* has"):
        evaluate.run(cfg, **stream, train=train, out=tmp_path / "out")
