import json
from pathlib import Path

import pytest
import torch
from tests.toyworld.conftest import load_config, replace
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoForCausalLM

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.stages import toyworld
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.toyworld.questions import BEYOND, all_tasks
from circuitmill.toyworld.world import make_world

FOLDER = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What Hugging Face's folders of a model and its tokenizer hold."""


@pytest.fixture(scope="module")
def cfg() -> ToyworldConfig:
    return load_config("tiny")


@pytest.fixture(scope="module")
def manifest(cfg: ToyworldConfig, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return toyworld.run(cfg, out=tmp_path_factory.mktemp("toyworld"))


def test_it_ends_with_a_manifest_that_verifies(manifest: Manifest):
    loaded = load_manifest(manifest.folder / "manifest.json", "toyworld")
    loaded.verify()
    assert loaded.digest == manifest.digest
    assert set(loaded.files) == {
        "corpus/train.txt",
        "corpus/heldout.txt",
        "truth.json",
        "metrics.jsonl",
        *(f"{folder}/{name}" for folder in ("early", "model") for name in FOLDER),
    }


def test_the_early_model_has_learned_less(manifest: Manifest):
    model, early = (
        AutoModelForCausalLM.from_pretrained(manifest.folder / name, local_files_only=True)
        for name in ("model", "early")
    )
    assert early.config.to_dict() == model.config.to_dict() | {"_name_or_path": early.config._name_or_path}
    text = AutoTokenizer.from_pretrained(manifest.folder / "model", local_files_only=True)(
        manifest.file("corpus/heldout.txt").read_text().splitlines()[:50], add_special_tokens=False
    ).input_ids
    longest = model.config.max_position_embeddings
    rows = [torch.tensor([ids[:longest]]) for ids in text if len(ids) > 1]
    losses = [sum(one(row, labels=row).loss.item() for row in rows) for one in (model, early)]
    assert losses[0] < losses[1]


def test_the_model_is_an_ordinary_folder(manifest: Manifest, cfg: ToyworldConfig):
    folder = manifest.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert model.config.model_type == "gpt_neo" and model.config.activation_function == "gelu_new"
    assert model.config.bos_token_id == tokenizer.bos_token_id == 256
    assert model.config.vocab_size == len(tokenizer) == manifest.counts["d_vocab"]
    assert model.num_parameters() == manifest.counts["parameters"]


def test_the_text_is_one_document_per_line(manifest: Manifest, cfg: ToyworldConfig):
    counts = manifest.counts["documents"]
    assert sum(counts.values()) == cfg.corpus.documents and 100 < counts["heldout"] < 300
    for name, count in counts.items():
        text = manifest.file(f"corpus/{name}.txt").read_text()
        assert text.endswith("\n") and text.count("\n") == count and "\n\n" not in text


def test_every_task_is_measured(manifest: Manifest, cfg: ToyworldConfig):
    counts, tasks = manifest.counts, all_tasks(make_world(cfg.seed))
    assert set(counts["accuracy"]) | set(counts["beyond"]) == set(counts["items"]) == set(tasks)
    assert set(counts["beyond"]) == set(BEYOND)
    assert set(counts["accuracy"]) == set(json.loads(manifest.file("truth.json").read_text())["tasks"])
    assert set(counts["ablation"]) == {"none", "mlp_0", "mlp_1", "all"}
    assert counts["ablation"]["none"] == counts["accuracy"]["two_hop_city"]
    assert set(counts["exchange"]) == {"after_layer_0", "after_layer_1", "n_pairs"}
    assert 0 < counts["loss"] < 7
    assert counts["extensions"] == 0 and counts["before_extension"] == []


def test_a_finished_model_is_not_trained_again(cfg: ToyworldConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that failed its bars keeps its model: measuring again does not train again."""
    strict = replace(cfg, accept={"two_hop_city": 1.0, "agreement": 0.0}, pretrain={"extensions": 0})
    with pytest.raises(DivergedError, match=r"two_hop_city >= 1; found two_hop_city 0\.\d+\n.*toyworld.accept"):
        toyworld.run(strict, out=tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(toyworld, "pretrain", lambda *args, **kwargs: pytest.fail("trained again"))
    with pytest.raises(DivergedError, match="two_hop_city"):
        toyworld.run(strict, out=tmp_path)


class Judge:
    """A stand-in for the figure of one task: what the model reaches after each number of extensions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: float) -> None:
        self.updates: list[int] = []
        """The number of each update made."""
        self.kill_at = -1
        update, measure = toyworld.Pretraining.update, toyworld._measure

        def counted(run: toyworld.Pretraining, tokens: object) -> float:
            if run.done == self.kill_at:
                raise KeyboardInterrupt
            self.updates.append(run.done)
            return update(run, tokens)

        def measured(*args: object) -> dict:
            figures = measure(*args)
            figures["accuracy"]["ioi"] = found[max(0, self.updates[-1] - 23) // 8]
            return figures

        monkeypatch.setattr(toyworld.Pretraining, "update", counted)
        monkeypatch.setattr(toyworld, "_measure", measured)


@pytest.fixture
def strict(cfg: ToyworldConfig) -> ToyworldConfig:
    """Bars that the judge decides about; 24 updates, extended by 8 each."""
    return replace(cfg, accept={"ioi": 0.9}, pretrain={"extensions": 2, "extension_tokens": 8 * 512})


def test_a_model_below_its_bars_is_trained_further(
    strict: ToyworldConfig,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    judge = Judge(monkeypatch, 0.5, 0.8, 0.95)
    with caplog.at_level("INFO"):
        made = toyworld.run(strict, out=tmp_path)
    assert judge.updates == list(range(24 + 8 + 8))
    assert "ioi 0.500 is below 0.9: pretraining goes on for 4096 tokens (extension 1 of at most 2)" in caplog.text
    assert "ioi 0.800 is below 0.9" in caplog.text
    counts = made.counts
    assert counts["extensions"] == 2 and counts["pretrain_tokens"] == 40 * 512
    assert counts["accuracy"]["ioi"] == 0.95
    assert [figures["accuracy"]["ioi"] for figures in counts["before_extension"]] == [0.5, 0.8]
    assert counts["before_extension"][0]["loss"] == manifest.counts["loss"], "the budget is spent as without a bar"
    assert counts["before_extension"][0]["loss"] > counts["before_extension"][1]["loss"] > counts["loss"]
    lines = [json.loads(line) for line in made.file("metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [4096 * i for i in range(1, 6)]
    assert not any("checkpoints" in name for name in made.files)


def test_a_model_that_meets_its_bars_is_not(
    strict: ToyworldConfig, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    judge = Judge(monkeypatch, 0.95)
    made = toyworld.run(strict, out=tmp_path)
    assert len(judge.updates) == 24 and made.counts["extensions"] == 0
    assert made.files == manifest.files


def test_bars_missed_after_all_extensions_are_an_error(
    strict: ToyworldConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    judge = Judge(monkeypatch, 0.5, 0.6, 0.7)
    for _ in "once", "again":
        with pytest.raises(DivergedError, match=r"ioi >= 0\.9; found ioi 0\.700 after 2 extension\(s\)"):
            toyworld.run(strict, out=tmp_path)
        assert len(judge.updates) == 40, "the second time only measures"
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("update", [24, 30, 35], ids=["before the first", "inside the first", "inside the second"])
def test_a_run_killed_in_an_extension_ends_in_the_same_manifest(
    update: int, strict: ToyworldConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With checkpoints every three updates: some kills are after one of the extension, some before."""
    cfg = replace(strict, pretrain={"checkpoint_tokens": 3 * 512})
    judge = Judge(monkeypatch, 0.5, 0.8, 0.95)
    straight = toyworld.run(cfg, out=tmp_path / "straight")
    judge.updates.clear()
    judge.kill_at = update
    with pytest.raises(KeyboardInterrupt):
        toyworld.run(cfg, out=tmp_path / "killed")
    judge.kill_at = -1
    continued = toyworld.run(cfg, out=tmp_path / "killed")
    assert len(judge.updates) < 40 + 3, "it went on from the checkpoint"
    assert continued.to_json() == straight.to_json()


def test_a_run_killed_while_it_saves_an_extended_model(
    strict: ToyworldConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder of the model may be half written then; nothing may begin from it."""
    Judge(monkeypatch, 0.5, 0.95)
    straight = toyworld.run(strict, out=tmp_path / "straight")
    real = GPTNeoForCausalLM.save_pretrained
    saves = []

    def broken(self: GPTNeoForCausalLM, folder: Path) -> None:
        saves.append(folder)
        # after the early model and the model of the first budget
        if len(saves) == 3:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        real(self, folder)

    monkeypatch.setattr(GPTNeoForCausalLM, "save_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        toyworld.run(strict, out=tmp_path / "killed")
    assert toyworld.run(strict, out=tmp_path / "killed").to_json() == straight.to_json()


def test_a_killed_run_ends_in_the_same_manifest(
    manifest: Manifest, cfg: ToyworldConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which also says that the same configuration gives the same corpus, weights, truth and figures."""
    update, made = toyworld.Pretraining.update, []

    def killed(self: toyworld.Pretraining, tokens: object) -> float:
        if len(made) == 12:
            raise KeyboardInterrupt
        made.append(update(self, tokens))
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toyworld.Pretraining, "update", killed)
        toyworld.run(cfg, out=tmp_path)
    assert list((tmp_path / "checkpoints").iterdir())
    assert toyworld.run(cfg, out=tmp_path).digest == manifest.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"mix": {"two_hops": 1.0}}}, r"names among .*two_hop.*; found two_hops\n.*toyworld.corpus.mix"),
        ({"accept": {"two_hop": 0.5}}, r"names among .*two_hop_city.*; found two_hop\n.*toyworld.accept"),
        (
            {"transformer": {"context": 16}},
            r"context of at least \d+, the longest question; found 16\n.*toyworld.transformer.context",
        ),
    ],
)
def test_a_name_or_size_that_makes_no_sense_is_an_error(
    changes: dict, message: str, cfg: ToyworldConfig, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        toyworld.run(replace(cfg, **changes), out=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
