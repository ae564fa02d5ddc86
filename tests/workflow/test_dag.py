"""What reruns when, on the real Snakefile with stages that do nothing."""

import json
import sys
from pathlib import Path

import pytest
from tests.workflow.conftest import Workflow

from circuitmill.config.compose import load_run
from circuitmill.pipeline import STAGES

pytestmark = pytest.mark.slow

AFTER_CACHE = {
    "configure": 1,
    "run_train": 1,
    "run_evaluate": 1,
    "features_block": len(load_run("demo").config("features", "main").units()),
    "run_features": 1,
    "interpret_block": len(load_run("demo").config("interpret", "main").units()),
    "run_interpret": 1,
    "attribute_prompt": len(load_run("demo").config("attribute", "main").units()),
    "run_attribute": 1,
    "run_report": 1,
}


def test_everything_is_made_and_a_second_run_does_nothing(finished_workflow: Workflow):
    results = finished_workflow.folder / "results" / "demo"
    for stage in STAGES:
        folder = results / stage.name if stage.shared else results / "main" / stage.name
        assert (folder / "manifest.json").is_file(), stage.name
    assert "Nothing to be done" in finished_workflow.snakemake("all")


def test_every_stage_gets_its_upstream_manifests(finished_workflow: Workflow):
    results = finished_workflow.folder / "results" / "demo"
    for stage in STAGES:
        folder = results / stage.name if stage.shared else results / "main" / stage.name
        manifests = [folder / "manifest.json"]
        manifests += sorted(folder.glob(f"{stage.unit}/*/manifest.json")) if stage.unit else []
        for manifest in manifests:
            call = json.loads(manifest.read_text())
            assert call[0] == stage.name
            assert (call.count(f"--{stage.unit}") == 1) == (manifest.parent != folder)
            for upstream in stage.upstream:
                given = Path(call[call.index(f"--{upstream}") + 1])
                assert given.parts[-2:] == (upstream, "manifest.json")


def test_a_change_of_train_reruns_train_and_what_follows_and_nothing_before(workflow: Workflow):
    assert workflow.planned("--config", "set=train.seed=12345") == AFTER_CACHE


def test_a_change_of_the_report_reruns_the_report_alone(workflow: Workflow):
    planned = workflow.planned("--config", "set=report.top_windows=7")
    assert planned == {"configure": 1, "run_report": 1}


def test_a_deleted_graph_is_the_only_one_rebuilt(workflow: Workflow):
    graphs = sorted((workflow.folder / "results/demo/main/attribute/prompt").glob("*/graph.json"))
    graphs[0].unlink()
    assert workflow.planned() == {"attribute_prompt": 1, "run_attribute": 1, "run_report": 1}


def test_a_lost_shard_is_the_only_one_rebuilt_before_what_reads_it(workflow: Workflow):
    shards = sorted((workflow.folder / "results/demo/cache/shard").glob("*/manifest.json"))
    shards[0].unlink()
    planned = workflow.planned("cache")
    assert planned == {"cache_shard": 1, "run_cache": 1, "cache": 1}


def test_a_single_stage_is_a_target(workflow: Workflow):
    (workflow.folder / "results/demo/main/evaluate/manifest.json").unlink()
    assert workflow.planned("evaluate") == {"run_evaluate": 1, "evaluate": 1}


def test_a_raised_revision_reruns_its_stage_and_what_follows(workflow: Workflow):
    pipeline = workflow.folder / "src/circuitmill/pipeline.py"
    pipeline.write_text(
        pipeline.read_text().replace('Stage("train", ("cache",))', 'Stage("train", ("cache",), revision=7)')
    )
    expected = {name: count for name, count in AFTER_CACHE.items() if name != "configure"}
    assert workflow.planned() == expected


def test_rewording_a_rule_reruns_nothing(workflow: Workflow):
    rule = workflow.folder / "workflow/rules/train.smk"
    rule.write_text(rule.read_text().replace("torchrun --standalone", "torchrun  --standalone"))
    assert workflow.planned() == {}


def test_variants_share_the_stages_before_train(workflow: Workflow):
    experiment = workflow.folder / "config/experiment/sweep.yaml"
    text = (workflow.folder / "config/experiment/demo.yaml").read_text().replace("name: demo", "name: sweep")
    experiment.write_text(text + "\nvariants:\n  a: [train.seed=1]\n  b: [train.seed=2]\n")
    planned = workflow.planned("--config", "run=sweep")
    assert planned["run_toyworld"] == planned["run_tokenize"] == planned["run_cache"] == 1
    assert planned["run_train"] == planned["run_report"] == 2
    experiment.write_text(text + "\nvariants:\n  a: [cache.seed=1]\n")
    text = workflow.snakemake("-n", "--config", "run=sweep", check=False)
    assert "a variant that overrides train or later stages only; found cache.seed=1" in text


def test_a_run_on_another_model_has_no_toyworld(workflow: Workflow):
    planned = workflow.planned("--config", "run=gpt2")
    assert "run_toyworld" not in planned and planned["run_tokenize"] == 1


def test_a_wrong_key_is_refused_before_any_job(workflow: Workflow):
    text = workflow.snakemake("--config", "set=train.lrr=1", check=False)
    assert "train" in text and "lrr" in text and "Job stats" not in text


def test_a_dry_run_imports_no_torch(workflow: Workflow):
    site = workflow.folder / "src" / "torch.py"
    site.write_text("raise RuntimeError('torch was imported')")
    workflow.snakemake("-n")
    assert sys.version_info >= (3, 11)
