import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.stages.small_run import (
    CONTEXT,
    D_MODEL,
    DEAD,
    N_FEATURES,
    N_LAYERS,
    Nothing,
    make_cache,
    make_second_model,
    make_train,
    model_options,
    options,
    random_transcoder,
)
from transformers import AutoTokenizer

from circuitmill.config.decode import decode
from circuitmill.config.evaluate import EvaluateConfig
from circuitmill.config.model import ModelConfig
from circuitmill.core.transcoder import Transcoder
from circuitmill.errors import ConfigError, ShapeError, StoreError, UpstreamError
from circuitmill.lm.load import LanguageModel, load_language_model
from circuitmill.lm.replacement import ablated_logits, original_logits, replacement_logits
from circuitmill.stages import evaluate
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.clt import load_clt
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest
from circuitmill.stores.tokens import TokenStore

BOS = 1


@pytest.fixture(scope="module")
def cfg(tiny_model_dir: Path) -> EvaluateConfig:
    plain = options("evaluate", "tiny", model=model_options(tiny_model_dir), max_tokens=None, max_one_layer_tokens=200)
    return decode(EvaluateConfig, plain, "evaluate")


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upstreams")
    paths = make_cache(folder, tiny_model_dir)
    return paths | {"train": make_train(folder / "train", paths["cache"], random_transcoder(paths["cache"]))}


@pytest.fixture(scope="module")
def upstreams(made: dict[str, Path]) -> dict[str, Path]:
    return {name: made[name] for name in ("tokenize", "cache", "train")}


@pytest.fixture(scope="module")
def finished(cfg: EvaluateConfig, upstreams: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return evaluate.run(cfg, **upstreams, out=tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def document(finished: Manifest) -> dict:
    return json.loads(finished.file("evaluation.json").read_text())


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Path) -> LanguageModel:
    model = ModelConfig(**model_options(tiny_model_dir))
    return load_language_model(model, toyworld=None, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def heldout(upstreams: dict[str, Path]) -> torch.Tensor:
    store = TokenStore.open(load_manifest(upstreams["tokenize"], "tokenize"))
    return torch.from_numpy(store.read("heldout", 0, store.n_sequences("heldout")).astype(np.int64))


@pytest.fixture(scope="module")
def clt(upstreams: dict[str, Path]) -> Transcoder:
    return load_clt(upstreams["train"].parent / "model")


def test_fit_and_sparsity_are_those_of_all_heldout_tokens(
    document: dict, made: dict[str, Path], clt: Transcoder
) -> None:
    # this cache is not quantised, so it holds what the live model computes
    store = ActivationStore.open(load_manifest(made["cache"], "cache"))
    rows = store.read("heldout", 0, store.n_tokens("heldout"))
    features = clt.encode(rows.inputs).detach()
    error = (rows.outputs - clt.decode(features).detach()).double().square().sum(dim=(0, 2))
    spread = (rows.outputs.double() - rows.outputs.double().mean(0)).square().sum(dim=(0, 2))
    fit, sparsity = document["fit"], document["sparsity"]
    assert document["tokens"]["evaluated"] == len(features)
    assert fit["per_layer"]["explained_variance"] == pytest.approx((1 - error / spread).tolist(), rel=1e-4)
    assert fit["explained_variance"] == pytest.approx(float(1 - error.sum() / spread.sum()), rel=1e-4)
    assert fit["nmse"] == pytest.approx(1 - fit["explained_variance"])
    assert sparsity["per_layer"]["l0"] == pytest.approx(
        (features > 0).sum((0, 2)).div(len(features)).tolist(), rel=1e-3
    )
    assert sparsity["l0"] == pytest.approx(sum(sparsity["per_layer"]["l0"]))
    dead = (features > 0).sum(0) == 0
    assert dead[DEAD] and sparsity["dead"] == int(dead.sum())
    assert sparsity["per_layer"]["dead"] == dead.sum(1).tolist()
    density = document["density_histogram"]
    assert [sum(row) for row in density["counts"]] == (~dead).sum(1).tolist()
    assert density["log10_edges"][-1] == 0 and 10 ** density["log10_edges"][0] * len(features) <= 1


def by_hand(original: torch.Tensor, changed: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float, float]:
    """Agreement, KL and cross-entropy by plain loops over positions."""
    agree, kl, loss = [], [], []
    for row in range(len(tokens)):
        for pos in range(CONTEXT):
            if tokens[row, pos] == BOS:
                continue
            p, q = original[row, pos].log_softmax(0), changed[row, pos].log_softmax(0)
            agree.append(float(p.argmax() == q.argmax()))
            kl.append(float((p.exp() * (p - q)).sum()))
            if pos + 1 < CONTEXT and tokens[row, pos + 1] != BOS:
                loss.append(-float(q[tokens[row, pos + 1]]))
    return float(np.mean(agree)), float(np.mean(kl)), float(np.mean(loss))


def test_behaviour_is_that_of_the_replacement_model(
    document: dict, lm: LanguageModel, clt: Transcoder, heldout: torch.Tensor, made: dict[str, Path]
) -> None:
    store = ActivationStore.open(load_manifest(made["cache"], "cache"))
    mean = store.read("heldout", 0, store.n_tokens("heldout")).outputs.mean(0)
    original = original_logits(lm, heldout)
    models = {
        "replacement": replacement_logits(lm, clt, heldout),
        "zero_ablation": ablated_logits(lm, torch.zeros(N_LAYERS, D_MODEL), heldout),
        "mean_ablation": ablated_logits(lm, mean, heldout),
    }
    expected = {name: by_hand(original, logits, heldout) for name, logits in models.items()}
    behaviour = document["behaviour"]
    loss = by_hand(original, original, heldout)[2]
    assert behaviour["original"]["cross_entropy"] == pytest.approx(loss, rel=1e-4)
    for name, values in expected.items():
        found = tuple(behaviour[name][key] for key in ("agreement", "kl", "cross_entropy"))
        assert found == pytest.approx(values, rel=1e-3, abs=1e-6), name
        for kind in ("zero", "mean"):
            ablated = expected[f"{kind}_ablation"][2]
            recovered = (ablated - values[2]) / (ablated - loss)
            assert behaviour[name][f"ce_recovered_{kind}"] == pytest.approx(recovered, rel=1e-2, abs=1e-4)
    assert behaviour["mean_ablation"]["ce_recovered_mean"] == 0


def test_one_layer_at_a_time(document: dict, lm: LanguageModel, clt: Transcoder, heldout: torch.Tensor) -> None:
    n_sequences = 200 // CONTEXT
    assert document["tokens"]["one_layer_sequences"] == n_sequences
    tokens = heldout[:n_sequences]
    original = original_logits(lm, tokens)
    assert [row["layer"] for row in document["one_layer"]] == list(range(N_LAYERS))
    for row in document["one_layer"]:
        changed = replacement_logits(lm, clt, tokens, layers=[row["layer"]])
        agreement, kl, _ = by_hand(original, changed, tokens)
        assert row["replacement"]["agreement"] == pytest.approx(agreement)
        assert row["replacement"]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_tables_and_figures_hold_the_same_figures(finished: Manifest, document: dict) -> None:
    load_manifest(finished.folder / "manifest.json", "evaluate").verify()
    assert {name for name in finished.files if name.startswith("plots/")} == {
        f"plots/{name}.svg" for name in ("explained_variance", "l0", "l0_histogram", "density", "one_layer")
    }
    layers = pq.read_table(finished.file("layers.parquet")).to_pydict()
    assert layers["explained_variance"] == document["fit"]["per_layer"]["explained_variance"]
    assert layers["kl"] == [row["replacement"]["kl"] for row in document["one_layer"]]
    features = pq.read_table(finished.file("features.parquet")).to_pydict()
    assert len(features["density"]) == N_LAYERS * N_FEATURES
    assert features["n_active"][DEAD[0] * N_FEATURES + DEAD[1]] == 0
    l0 = pq.read_table(finished.file("l0.parquet")).to_pydict()
    evaluated = document["tokens"]["evaluated"]
    assert sum(l0["tokens"]) == evaluated
    mean = sum(n * tokens for n, tokens in zip(l0["n_features"], l0["tokens"], strict=True)) / evaluated
    assert mean == pytest.approx(document["sparsity"]["l0"])


def test_headline_figures_are_in_the_manifest(finished: Manifest, document: dict) -> None:
    counts = finished.counts
    assert counts["explained_variance"] == document["fit"]["explained_variance"]
    assert counts["kl"] == document["behaviour"]["replacement"]["kl"]
    assert counts["tasks"] is None and document["tasks"] is None


def test_a_transcoder_that_writes_the_mean_is_mean_ablation(
    cfg: EvaluateConfig, made: dict[str, Path], upstreams: dict[str, Path], tmp_path: Path
) -> None:
    store = ActivationStore.open(load_manifest(made["cache"], "cache"))
    constant = Transcoder(N_LAYERS, 3, D_MODEL)
    with torch.no_grad():
        constant.b_dec.copy_(store.read("heldout", 0, store.n_tokens("heldout")).outputs.mean(0))
    train = make_train(tmp_path / "train", made["cache"], constant, version=1)
    manifest = evaluate.run(cfg, **(upstreams | {"train": train}), out=tmp_path / "out")
    found = json.loads(manifest.file("evaluation.json").read_text())
    assert found["fit"]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert (found["sparsity"]["l0"], found["sparsity"]["dead"]) == (0, 6)
    assert found["behaviour"]["replacement"] == pytest.approx(found["behaviour"]["mean_ablation"], abs=1e-3)


def test_tasks_are_scored_on_three_models(
    cfg: EvaluateConfig, made: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, lm: LanguageModel, clt: Transcoder
) -> None:
    """The embedded model's stage output, with truth that the tiny model happens to know."""
    prompts = ["Dallas is in", "the capital of", "Texas", "of the state", "in Austin", "is the"]
    first = torch.stack([original_logits(lm, _prompt(lm, text))[0, -1].argmax() for text in prompts])
    replaced = torch.stack([replacement_logits(lm, clt, _prompt(lm, text))[0, -1].argmax() for text in prompts])
    answers = [lm.tokenizer.decode([token]) for token in first.tolist()]
    usable = [index for index, text in enumerate(answers) if "\ufffd" not in text and "<" not in text]
    assert usable
    truth = {
        "format": 1,
        "tasks": {
            "knows": {
                "description": "what the model answers",
                "rule": "first_token",
                "items": [{"prompt": prompts[index], "answer": answers[index]} for index in usable],
            }
        },
        "circuits": {},
    }
    output = StageOutput("toyworld", Nothing(), {}, tmp_path / "toyworld")
    output.path("truth.json").write_text(json.dumps(truth))
    for file in tiny_model_dir.iterdir():
        output.path("model", file.name).write_bytes(file.read_bytes())
    output.finish({})
    embedded = dataclasses.replace(cfg, model=ModelConfig("toyworld", "toyworld", "", "float32"))
    manifest = evaluate.run(
        embedded,
        toyworld=tmp_path / "toyworld" / "manifest.json",
        tokenize=made["tokenize"],
        cache=made["cache"],
        train=made["train"],
        out=tmp_path / "out",
    )
    row = pq.read_table(manifest.file("tasks.parquet")).to_pylist()[0]
    assert (row["name"], row["n"], row["original"]) == ("knows", len(usable), 1.0)
    assert row["replacement"] == pytest.approx(float((first == replaced)[usable].double().mean()))
    assert manifest.counts["tasks"] == {"knows": [row["original"], row["replacement"]]}
    assert "plots/tasks.svg" in manifest.files


def _prompt(lm: LanguageModel, text: str) -> torch.Tensor:
    return torch.tensor([[BOS, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])


def test_a_rerun_writes_the_same_bytes(
    cfg: EvaluateConfig, upstreams: dict[str, Path], finished: Manifest, tmp_path: Path
) -> None:
    assert evaluate.run(cfg, **upstreams, out=tmp_path / "again").digest == finished.digest


def test_a_budget_below_one_sequence(cfg: EvaluateConfig, upstreams: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"at least one sequence \(32 tokens\); found 31 tokens\n  where: evaluate.max_"
    ):
        evaluate.run(dataclasses.replace(cfg, max_tokens=31), **upstreams, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="a positive number or null; found 0"):
        dataclasses.replace(cfg, max_task_items=0)


def test_a_transcoder_of_another_model_is_refused(
    cfg: EvaluateConfig, made: dict[str, Path], upstreams: dict[str, Path], tmp_path: Path
) -> None:
    train = make_train(tmp_path / "train", made["cache"], Transcoder(3, 4, D_MODEL), version=2)
    with pytest.raises(ShapeError, match="expected a transcoder of 2 layers and width 16"):
        evaluate.run(cfg, **(upstreams | {"train": train}), out=tmp_path / "out")


def test_tokens_of_another_tokenizer_are_refused(
    cfg: EvaluateConfig, upstreams: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["Dallas"])
    tokenizer.save_pretrained(other)
    changed = dataclasses.replace(cfg, model=ModelConfig(**model_options(other)))
    with pytest.raises(UpstreamError, match="tokens made by the tokenizer of model .*; found tokens of"):
        evaluate.run(changed, **upstreams, out=tmp_path / "out")


def test_another_model_than_that_of_the_cache_is_refused(
    cfg: EvaluateConfig, upstreams: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = make_second_model(tmp_path / "other", tiny_model_dir)
    changed = dataclasses.replace(cfg, model=ModelConfig(**model_options(other)))
    with pytest.raises(UpstreamError, match="a cache of model .*; found one of a model with digest"):
        evaluate.run(changed, **upstreams, out=tmp_path / "out")


def test_a_truncated_weight_file_leaves_the_earlier_result(
    cfg: EvaluateConfig, made: dict[str, Path], upstreams: dict[str, Path], clt: Transcoder, tmp_path: Path
) -> None:
    train = make_train(tmp_path / "train", made["cache"], clt, version=3)
    out = tmp_path / "out"
    earlier = evaluate.run(cfg, **(upstreams | {"train": train}), out=out)
    weights = tmp_path / "train" / "model" / "W_enc_1.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(bytes(data[:-8]))
    with pytest.raises(UpstreamError, match=r"bytes; found \d+ bytes\n.*W_enc_1.safetensors"):
        evaluate.run(cfg, **(upstreams | {"train": train}), out=out)
    data[0] ^= 255
    weights.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"W_enc_1.safetensors"):
        evaluate.run(cfg, **(upstreams | {"train": train}), out=out)
    assert load_manifest(out / "manifest.json", "evaluate").digest == earlier.digest
