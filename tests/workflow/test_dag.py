"""What reruns when, on the real Snakefile with stages that do nothing."""

import json
import re
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


def test_training_is_launched_with_a_process_per_gpu(finished_workflow: Workflow):
    """And on several nodes of a Slurm job by a step of its own; on how many is no reason to train again."""
    folder = finished_workflow.folder / "results/demo/main/train"
    assert json.loads((folder / "launch.json").read_text()) == ["launch", "--per-node", "1", "--threads", "2"]
    again = ["-n", "-p", "--forcerun", "run_train", "--config", "run=demo", "--set-resources"]
    text = finished_workflow.snakemake("train", *again, "run_train:gpu=2", "--resources", "gpu=2")
    assert re.search(r"command:\s+python -m circuitmill launch --per-node 2 --threads 2 train --config", text)
    nodes = ["run_train:nodes=2", "run_train:gres=gpu:4", "run_train:cpus_per_task=8"]
    text = finished_workflow.snakemake("train", *again, *nodes)
    step = "srun -N 2 -n 2 --cpus-per-task=8 --gres=gpu:4 "
    assert f"{step}python -m circuitmill launch --per-node 4 --threads 2 train --config" in text
    assert finished_workflow.planned("all", "--set-resources", *nodes) == {}


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
    text = pipeline.read_text()
    raised, found = re.subn(r'(Stage\("train", .*revision=)\d+', r"\g<1>77", text)
    assert found == 1
    pipeline.write_text(raised)
    expected = {name: count for name, count in AFTER_CACHE.items() if name != "configure"}
    assert workflow.planned() == expected


def test_rewording_a_rule_reruns_nothing(workflow: Workflow):
    rule = workflow.folder / "workflow/rules/train.smk"
    rule.write_text(rule.read_text().replace("python -m", "python  -m"))
    assert workflow.planned() == {}


def write_sweep(workflow: Workflow, **variants: str) -> Path:
    """Make `sweep` the tiny run with these variants; returns its results folder."""
    text = (workflow.folder / "config/experiment/tiny.yaml").read_text().replace("name: tiny", "name: sweep")
    lines = "".join(f"  {name.replace('_', '-')}: [{overrides}]\n" for name, overrides in variants.items())
    (workflow.folder / "config/experiment/sweep.yaml").write_text(f"{text}\nvariants:\n{lines}")
    return workflow.folder / "results/sweep"


CODECS = {
    "bf16_0": "cache.codec=bf16, train.seed=0",
    "bf16_1": "cache.codec=bf16, train.seed=1",
    "int4_0": "cache.codec=int4, train.seed=0",
    "int4_1": "cache.codec=int4, train.seed=1",
}


def call_of(manifest: Path, flag: str) -> list[str]:
    """What a stage was given with a flag, as paths below the run's folder."""
    call = json.loads(manifest.read_text())
    given = call[call.index(flag) + 1 :]
    values = given[: next((place for place, word in enumerate(given) if word.startswith("--")), None)]
    return [Path(value).relative_to("results/sweep").as_posix() for value in values]


def test_variants_that_agree_share_the_stages_before_train_in_the_run_s_folder(workflow: Workflow):
    results = write_sweep(workflow, a="train.seed=1", b="train.seed=2")
    planned = workflow.planned("--config", "run=sweep")
    for stage in ("toyworld", "tokenize", "calibrate", "cache"):
        assert planned[f"run_{stage}"] == 1
    assert planned["run_train"] == planned["run_report"] == 2
    workflow.snakemake("all", "--config", "run=sweep")
    assert {path.name for path in results.iterdir()} == {
        "toyworld",
        "tokenize",
        "calibrate",
        "cache",
        "a",
        "b",
        "config",
        "logs",
        "benchmarks",
    }
    assert {path.stem for path in (results / "config").iterdir()} == {"toyworld", "tokenize", "calibrate", "cache"}
    assert call_of(results / "b/train/manifest.json", "--cache") == ["cache/manifest.json"]
    assert call_of(results / "b/report/manifest.json", "--siblings") == ["a/evaluate/manifest.json"]
    assert call_of(results / "b/report/manifest.json", "--study") == []


def test_variants_with_another_cache_share_it_by_content(workflow: Workflow):
    results = write_sweep(workflow, **CODECS)
    run = load_run("tiny")
    planned = workflow.planned("--config", "run=sweep")
    shards = len(run.config("cache").units())
    assert planned["run_toyworld"] == planned["run_tokenize"] == planned["run_calibrate"] == 1
    assert (planned["run_cache"], planned["cache_shard"]) == (2, 2 * shards)
    assert planned["run_train"] == planned["run_report"] == 4
    # three shared frozen configurations, one of each cache, six of each variant
    assert planned["configure"] == 3 + 2 + 6 * 4
    # the target of a stage is each group's output
    assert workflow.planned("cache", "--config", "run=sweep") == {
        "configure": 5,
        "run_toyworld": 1,
        "run_tokenize": 1,
        "run_calibrate": 1,
        "cache_shard": 2 * shards,
        "run_cache": 2,
        "cache": 1,
    }
    workflow.snakemake("all", "--config", "run=sweep")
    assert "Nothing to be done" in workflow.snakemake("all", "--config", "run=sweep")
    assert sorted(path.relative_to(results).as_posix() for path in results.rglob("cache/manifest.json")) == [
        "bf16-0/cache/manifest.json",
        "int4-0/cache/manifest.json",
    ]
    for codec in ("bf16", "int4"):
        owner = results / f"{codec}-0"
        assert f"codec: {codec}" in (owner / "config/cache.yaml").read_text()
        given = call_of(owner / "cache/manifest.json", "--config")
        assert given == [f"{codec}-0/config/cache.yaml"]
        assert (results / f"logs/{codec}-0/cache.log").is_file()
        assert (results / f"benchmarks/{codec}-0/cache.jsonl").is_file()
        for seed in (0, 1):
            for stage in ("train", "features", "report"):
                given = call_of(results / f"{codec}-{seed}/{stage}/manifest.json", "--cache")
                assert given == [f"{codec}-0/cache/manifest.json"], (codec, seed, stage)
            assert call_of(results / f"{codec}-{seed}/train/manifest.json", "--tokenize") == ["tokenize/manifest.json"]
    names = [name.replace("_", "-") for name in CODECS]
    study = ["bf16-0/cache", "int4-0/cache"]
    study += [f"{name}/{stage}" for stage in ("train", "evaluate", "attribute") for name in names]
    assert call_of(results / "int4-1/report/manifest.json", "--study") == [f"{path}/manifest.json" for path in study]


def test_a_change_of_one_cache_reruns_the_variants_that_share_it(workflow: Workflow):
    write_sweep(workflow, **CODECS)
    workflow.snakemake("all", "--config", "run=sweep")
    changed = {name: text.replace("int4", "int2") for name, text in CODECS.items()}
    write_sweep(workflow, **changed)
    planned = workflow.planned("--config", "run=sweep")
    run = load_run("tiny")
    assert planned == {
        "configure": 1,
        "cache_shard": len(run.config("cache").units()),
        "run_cache": 1,
        "run_train": 2,
        "run_evaluate": 2,
        "features_block": 2 * len(run.config("features", "main").units()),
        "run_features": 2,
        "interpret_block": 2 * len(run.config("interpret", "main").units()),
        "run_interpret": 2,
        "attribute_prompt": 2 * len(run.config("attribute", "main").units()),
        "run_attribute": 2,
        # every report has the study of all variants
        "run_report": 4,
    }


def test_stages_before_the_cache_are_divided_with_all_that_follows_them(workflow: Workflow):
    results = write_sweep(workflow, a="", b="tokenize.max_train_tokens=6400")
    workflow.snakemake("all", "--config", "run=sweep")
    for stage in ("tokenize", "calibrate", "cache"):
        assert not (results / stage).exists()
        for variant in ("a", "b"):
            assert call_of(results / f"{variant}/{stage}/manifest.json", "--toyworld") == ["toyworld/manifest.json"]
    for variant in ("a", "b"):
        assert call_of(results / f"{variant}/cache/manifest.json", "--tokenize") == [
            f"{variant}/tokenize/manifest.json"
        ]
        given = call_of(results / f"{variant}/train/manifest.json", "--tokenize")
        assert given == [f"{variant}/tokenize/manifest.json"]


def test_a_variant_of_something_else_than_stages_is_refused(workflow: Workflow):
    write_sweep(workflow, a="name=other")
    text = workflow.snakemake("-n", "--config", "run=sweep", check=False)
    assert "a variant that overrides options of stages or of the model only; found name=other" in text


def test_a_variant_starts_from_the_training_of_another(workflow: Workflow):
    results = write_sweep(workflow, then="train.base=first", first="")
    workflow.snakemake("train", "--config", "run=sweep")
    assert call_of(results / "then/train/manifest.json", "--base") == ["first/train/manifest.json"]
    assert call_of(results / "first/train/manifest.json", "--base") == []
    write_sweep(workflow, then="train.base=first", first="train.seed=77")
    assert workflow.planned("train", "--config", "run=sweep") == {"configure": 1, "run_train": 2, "train": 1}
    write_sweep(workflow, then="'train.base=first', train.seed=77", first="")
    assert workflow.planned("train", "--config", "run=sweep") == {"configure": 1, "run_train": 1, "train": 1}


def test_a_variant_starts_from_a_training_of_another_run(workflow: Workflow):
    results = write_sweep(workflow, a="train.base=demo/main")
    workflow.snakemake("train", "--config", "run=sweep")
    call = json.loads((results / "a/train/manifest.json").read_text())
    assert call[call.index("--base") + 1] == "results/demo/main/train/manifest.json"
    write_sweep(workflow, b="train.base=gone/main")
    text = workflow.snakemake("train", "--config", "run=sweep", check=False)
    assert "results/gone/main/train/manifest.json" in text and "Missing input files" in text


def test_a_base_that_leads_back_is_refused_before_any_job(workflow: Workflow):
    write_sweep(workflow, a="train.base=b", b="train.base=a")
    text = workflow.snakemake("-n", "--config", "run=sweep", check=False)
    assert "does not start from its own outcome, found a -> b -> a" in text and "Job stats" not in text


def test_a_variant_that_cannot_be_traced_has_no_prompts(workflow: Workflow):
    results = write_sweep(workflow, a="", b="train.architecture.skip=true")
    prompts = len(load_run("tiny").config("attribute", "main").units())
    planned = workflow.planned("--config", "run=sweep")
    assert (planned["attribute_prompt"], planned["run_attribute"], planned["run_report"]) == (prompts, 2, 2)
    workflow.snakemake("attribute", "--config", "run=sweep")
    assert not (results / "b/attribute/prompt").exists()
    assert len(list((results / "a/attribute/prompt").iterdir())) == prompts
    assert "undefined: the linear skip connection" in (results / "b/config/attribute.yaml").read_text()
    assert "undefined" not in (results / "a/config/attribute.yaml").read_text()
    assert "Nothing to be done" in workflow.snakemake("attribute", "--config", "run=sweep")


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
