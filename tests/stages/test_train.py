import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import REPOSITORY
from tests.stages.small_run import make_upstreams, options

from circuitmill.config.decode import decode
from circuitmill.config.train import TrainConfig
from circuitmill.errors import ConfigError, InterruptedRun, StoreError, UpstreamError
from circuitmill.stages import train as stage
from circuitmill.stores.activations import ActivationStore
from circuitmill.stores.clt import load_clt
from circuitmill.stores.manifest import load_manifest, plain
from circuitmill.stores.metrics import read_metrics
from circuitmill.stores.tensors import read_tensors
from circuitmill.training import loop

STATE = "shard-00001-model-00001-of-00001.safetensors"
"""Of a checkpoint of one rank."""


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    return decode(TrainConfig, options("train", "tiny"), "train")


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """Manifests of a cache of a few thousand tokens and of its tokens, made by the stages that make it in a run."""
    folder = tmp_path_factory.mktemp("upstream")
    return make_upstreams(folder, tiny_model_dir, n_texts=1000)


@pytest.fixture(scope="module")
def cache(upstreams: dict[str, Path]) -> Path:
    return upstreams["cache"]


@pytest.fixture(scope="module")
def finished(cfg, upstreams, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "train"
    stage.run(cfg, **upstreams, out=out)
    return out


def arguments(upstreams: dict[str, Path]) -> list[str]:
    """The same on a command line."""
    return [text for name, path in upstreams.items() for text in (f"--{name}", str(path))]


def same_model(one: Path, other: Path) -> None:
    names = sorted(path.name for path in (one / "model").glob("*.safetensors"))
    assert names
    for name in names:
        ours, theirs = read_tensors(one / "model" / name), read_tensors(other / "model" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def without_times(path: Path) -> list[dict]:
    return [
        {
            key: value
            for key, value in row.items()
            if key not in ("tokens_per_second", "data_wait_share", "peak_memory_bytes")
        }
        for row in read_metrics(path / "metrics.jsonl")
    ]


def test_manifest_counts_and_files(finished, cfg):
    manifest = load_manifest(finished / "manifest.json", "train")
    manifest.verify()
    assert manifest.counts["tokens"] == cfg.tokens and manifest.counts["steps"] == 32
    assert (manifest.counts["n_layers"], manifest.counts["n_features"], manifest.counts["d_model"]) == (2, 32, 16)
    assert len(manifest.counts["l0"]) == 2
    assert {"model/config.yaml", "model/W_enc_1.safetensors", "model/W_dec_0.safetensors", "metrics.jsonl"} <= set(
        manifest.files
    )
    assert [row["tokens"] for row in read_metrics(finished / "metrics.jsonl")] == list(range(512, 8193, 512))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000024", "step-00000032"]


def test_the_folded_model_reads_and_writes_raw_activations(finished, cfg, cache):
    store = ActivationStore.open(load_manifest(cache, "cache"))
    rows = store.read("heldout", 0, 200)
    clt = load_clt(finished / "model")
    saved = read_tensors(finished / "checkpoints" / "step-00000032" / STATE)
    scale = store.normalization
    from circuitmill.core.transcoder import Transcoder

    unfolded = Transcoder(2, 32, 16)
    unfolded.load_state_dict(
        {name.removeprefix("parameter."): t for name, t in saved.items() if name.startswith("parameter.")}
    )
    with torch.no_grad():
        expected = unfolded(rows.inputs * scale.input_scale[:, None]) / scale.output_scale[:, None]
        found = clt(rows.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_stopped_training_continues_to_the_same_bits(finished, cfg, upstreams, tmp_path, monkeypatch):
    calls = iter(range(100))
    monkeypatch.setattr(stage.StopRequest, "__bool__", lambda self: next(calls) == 9)
    with pytest.raises(InterruptedRun, match="after step 10"):
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    assert not (tmp_path / "train" / "manifest.json").exists()
    assert not (tmp_path / "train" / "model").exists()
    monkeypatch.undo()
    stage.run(cfg, **upstreams, out=tmp_path / "train")
    same_model(tmp_path / "train", finished)
    assert without_times(tmp_path / "train") == without_times(finished)


def test_a_crash_between_checkpoints_continues_to_the_same_bits(finished, cfg, upstreams, tmp_path, monkeypatch):
    whole = loop._step

    def fails(cfg, state, *rest, **asked):
        if state.step == 21:
            raise OSError("the machine is gone")
        return whole(cfg, state, *rest, **asked)

    monkeypatch.setattr(loop, "_step", fails)
    with pytest.raises(OSError, match="the machine is gone"):
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    monkeypatch.undo()
    stage.run(cfg, **upstreams, out=tmp_path / "train")
    same_model(tmp_path / "train", finished)
    assert without_times(tmp_path / "train") == without_times(finished)


def test_kill_dash_nine_and_again(cfg, upstreams, tmp_path):
    slow = dataclasses.replace(cfg, tokens=256 * 400, checkpoint_tokens=256 * 3)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(plain(slow)))
    command = [
        *(sys.executable, "-m", "circuitmill", "train", "--config", str(config)),
        *arguments(upstreams),
        *("--out", str(tmp_path / "killed")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    checkpoints = tmp_path / "killed" / "checkpoints"
    while len(list(checkpoints.glob("step-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    stage.run(slow, **upstreams, out=tmp_path / "killed")
    stage.run(slow, **upstreams, out=tmp_path / "unbroken")
    same_model(tmp_path / "killed", tmp_path / "unbroken")
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_terminated_command_exits_with_75_and_continues(cfg, upstreams, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(plain(dataclasses.replace(cfg, tokens=256 * 2000))))
    command = [sys.executable, "-m", "circuitmill", "train", "--config", str(config)]
    command += [*arguments(upstreams), "--out", str(tmp_path / "train")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "train" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "a request to stop after step" in errors and "run the same command again" in errors


def test_what_was_needed_is_said_beside_what_was_planned(cfg, upstreams, tmp_path, caplog):
    with caplog.at_level("INFO"):
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("peak memory")]
    total, more, planned, reserved = map(float, re.findall(r"\d+\.\d\d", said))
    assert "planned" in said and total > more >= 0 and reserved > planned >= 0
    assert any("strategy single" in record.getMessage() for record in caplog.records)


def test_another_configuration_starts_again(cfg, upstreams, tmp_path):
    calls = iter(range(100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr(stage.StopRequest, "__bool__", lambda self: next(calls) == 9)
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    other = dataclasses.replace(cfg, seed=5, tokens=1024)
    manifest = stage.run(other, **upstreams, out=tmp_path / "train")
    assert manifest.counts["steps"] == 4
    assert [path.name for path in (tmp_path / "train" / "checkpoints").iterdir()] == ["step-00000004"]
    assert [row["step"] for row in read_metrics(tmp_path / "train" / "metrics.jsonl")] == [2, 4]


def test_metrics_are_mirrored_offline(cfg, upstreams, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    short = dataclasses.replace(cfg, tokens=1024, wandb=True)
    stage.run(short, **upstreams, out=tmp_path / "train")
    assert list((tmp_path / "train" / "wandb").glob("offline-run-*/*.wandb"))
    assert capfd.readouterr().out == ""


def test_a_missing_cache_is_named(cfg, upstreams, tmp_path):
    with pytest.raises(UpstreamError, match=r"nowhere/manifest\.json"):
        stage.run(cfg, **upstreams | {"cache": tmp_path / "nowhere" / "manifest.json"}, out=tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_a_damaged_checkpoint_is_named_and_stays(cfg, upstreams, tmp_path, monkeypatch):
    calls = iter(range(100))
    monkeypatch.setattr(stage.StopRequest, "__bool__", lambda self: next(calls) == 9)
    with pytest.raises(InterruptedRun):
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    damaged = tmp_path / "train" / "checkpoints" / "step-00000010" / STATE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"step-00000010/shard-00001"):
        stage.run(cfg, **upstreams, out=tmp_path / "train")
    assert damaged.exists()


def test_ranks_that_cannot_share_a_batch_are_refused(cfg, upstreams, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"multiple of the number of ranks \(3\); found 256"):
        stage.run(cfg, **upstreams, out=tmp_path / "train")


@pytest.mark.parametrize("option", ["default", "tiny", "gpt2"])
def test_options_decode(option):
    assert decode(TrainConfig, options("train", option), "train").steps > 10


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 0.0}, "train.lr"),
        ({"batch_tokens": 10**9}, "train.batch_tokens"),
        ({"warmup_tokens": 8192}, "train.warmup_tokens"),
        ({"decay_share": 1.5}, "train.decay_share"),
        ({"beta2": 1.0}, "train.beta2"),
    ],
)
def test_values_that_make_no_sense_are_refused(change, key):
    with pytest.raises(ConfigError, match=key):
        decode(TrainConfig, options("train", "tiny") | change, "train")


def test_metrics_file_is_plain_json_lines(finished):
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] for line in lines)


@pytest.mark.parametrize("name", ["topk", "token_topk", "batch_topk", "batch_topk_all", "groupmax"])
def test_a_top_k_kind_ends_with_thresholds_that_keep_its_l0(name, cfg, upstreams, cache, tmp_path):
    own = dataclasses.replace(cfg.nonlinearity, name=name, k=4.0)
    stage.run(dataclasses.replace(cfg, nonlinearity=own), **upstreams, out=tmp_path / "train")
    rows = ActivationStore.open(load_manifest(cache, "cache")).read("heldout", 0, own.calibration_tokens)
    clt = load_clt(tmp_path / "train" / "model")
    l0 = (clt.encode(rows.inputs) > 0).sum(dim=(0, 2)) / own.calibration_tokens
    assert (clt.threshold.std(dim=1) < 1e-6).all() == name.startswith("batch")
    if name == "groupmax":
        assert (l0 <= 4).all() and (l0 > 1).all()
    else:
        # equal tokens have equal pre-activations, and all of them are on one side of the threshold
        assert l0.mean().item() == pytest.approx(4.0, rel=0.1)
