"""What jobs ask for by a site file, and what is wrong with one."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import REPOSITORY

from circuitmill import cli
from circuitmill.config.decode import decode
from circuitmill.config.site import RuleSite, Site, gpus_here, load_site
from circuitmill.errors import ConfigError


def site(**options: Any) -> Site:
    return decode(Site, {"scheduler": "slurm"} | options, "site")


def asked(own: Site, name: str = "run_x", *, attempt: int = 1, times: int = 1, gpus_here: int = 0) -> dict[str, Any]:
    found = own.resources(name, mem_mb=4000, runtime=60, threads=2, times=times, gpus_here=gpus_here)
    return {key: value(None, attempt) if callable(value) else value for key, value in found.items()}


def test_a_rule_that_is_not_named_has_its_own_numbers():
    assert asked(site()) == {"mem_mb": 4000, "runtime": 60, "cpus_per_task": 2}
    assert site().cpus("run_x", 2) == 2 and site(rules={"run_x": {"cpus": 5}}).cpus("run_x", 2) == 5


def test_names_of_the_cluster():
    own = site(
        account="lab",
        partition="cpu",
        gpu_partition="gpu",
        qos="normal",
        constraint="fast",
        reservation="night",
        rules={
            "a": {"gpus": 1},
            "b": {"gpus": 2, "gpu_model": "a100", "partition": "big", "qos": "high", "constraint": "slow"},
        },
    )
    common = {"mem_mb": 4000, "runtime": 60, "cpus_per_task": 2, "slurm_account": "lab"}
    normal = {"qos": "normal", "constraint": "fast", "slurm_extra": "--reservation=night"}
    assert asked(own) == common | normal | {"slurm_partition": "cpu"}
    assert asked(own, "a") == common | normal | {"slurm_partition": "gpu", "gpu": 1, "tasks_per_gpu": 0}
    assert asked(own, "b") == common | {
        "slurm_partition": "big",
        "qos": "high",
        "constraint": "slow",
        "gpu": 2,
        "gpu_model": "a100",
        "tasks_per_gpu": 0,
        "slurm_extra": "--reservation=night",
    }


def test_memory_and_time_grow_with_the_attempt_up_to_a_limit():
    own = site(rules={"run_x": {"mem_mb": 1001, "runtime": 11}})
    grown = [asked(own, attempt=attempt) for attempt in (1, 2, 3, 9)]
    assert [each["mem_mb"] for each in grown] == [1001, 1502, 2002, 2002]
    assert [each["runtime"] for each in grown] == [11, 17, 22, 22]
    limited = asked(site(max_mem_mb=5000, max_runtime=70), attempt=3)
    assert (limited["mem_mb"], limited["runtime"]) == (5000, 70)
    assert asked(site(), times=10)["runtime"] == 600


def test_a_training_is_warned_and_every_attempt_has_the_same():
    own = site(warn_s=90, rules={"run_train": {"extra": "--exclusive"}})
    first, third = (asked(own, "run_train", attempt=attempt) for attempt in (1, 3))
    assert first == third
    assert first["slurm_extra"] == "--exclusive --signal=USR1@90"
    with pytest.raises(ConfigError, match="less than the time limit of run_train, 60 s"):
        asked(site(warn_s=60, rules={"run_train": {"runtime": 1}}), "run_train")


def test_several_nodes_start_one_task_each():
    own = site(gpu_model="h100", gpu_partition="gpu", rules={"run_train": {"nodes": 2, "gpus": 4, "cpus": 16}})
    found = asked(own, "run_train")
    expected = {"mpi": "srun", "nodes": 2, "tasks": 2, "tasks_per_gpu": 0, "gres": "gpu:h100:4", "cpus_per_task": 16}
    assert expected.items() <= found.items() and "gpu" not in found and found["slurm_partition"] == "gpu"
    without = asked(site(rules={"run_train": {"nodes": 3}}), "run_train")
    assert without["tasks"] == 3 and "gres" not in without and "tasks_per_gpu" not in without


def test_one_machine():
    rules = {"cache_shard": {"gpus": 1}, "run_train": {"all_gpus": True}}
    own = site(scheduler="local", rules=rules)
    assert asked(own, "cache_shard", gpus_here=4) == {"mem_mb": 4000, "runtime": 60, "gpu": 1}
    assert asked(own, "run_train", gpus_here=4)["gpu"] == 4
    assert asked(own, "run_x", gpus_here=4)["gpu"] == 0
    assert own.shares(4) == "cache_shard=1,run_train=4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"acount": "lab"}, ("site.acount", "nearest valid key: site.account")),
        ({"scheduler": "pbs"}, ("site.scheduler", "slurm, local")),
        ({"rules": {"run_train": {"gpu": 1}}}, ("site.rules.run_train.gpu", "site.rules.run_train.gpus")),
        ({"rules": {"cache_shard": {"nodes": 2}}}, ("cache_shard.nodes", "only a training has ranks")),
        ({"rules": {"run_train": {"all_gpus": True}}}, ("run_train.all_gpus",)),
        ({"rules": {"run_x": {"mem_mb": 0}}}, ("mem_mb", "at least 1")),
        ({"shards_per_job": 8}, ("site.shards_per_job", "1, 10, 100")),
        ({"warn_s": 0}, ("site.warn_s",)),
        ({"modules": "cuda"}, ("site.modules", "a list of str")),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        site(**options)
    for word in words:
        assert word in str(caught.value)


def test_the_file_is_named_by_the_profile_or_the_environment(tmp_path: Path):
    path = tmp_path / "site.yaml"
    path.write_text("scheduler: slurm\naccount: lab\n")
    assert load_site(None, {}) is None
    for found in (load_site(str(path), {}), load_site("elsewhere", {"CIRCUITMILL_SITE": str(path)})):
        assert found is not None and found.account == "lab"


def test_no_file_and_a_broken_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such file\n.*\n.*cp .*site.example.yaml .*site.yaml, and edit it"):
        load_site(str(tmp_path / "site.yaml"), {})
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="a site file in YAML"):
        load_site(str(path), {})
    path.write_text("")
    with pytest.raises(ConfigError, match="a mapping"):
        load_site(str(path), {})


@pytest.mark.parametrize("path", ["profiles/slurm/site.example.yaml", "profiles/gpu/site.yaml"])
def test_shipped_files_name_rules_that_exist(path: str):
    found = load_site(str(REPOSITORY / path), {})
    text = "".join(each.read_text() for each in (REPOSITORY / "workflow/rules").glob("*.smk"))
    assert found is not None and found.rules
    assert {name for name in found.rules if f"\nrule {name}:" not in text} == set()


def test_the_example_shows_every_key():
    given = yaml.safe_load((REPOSITORY / "profiles/slurm/site.example.yaml").read_text())
    assert set(given) == set(Site.__dataclass_fields__)


def test_every_key_is_described(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "--site"]) == 0
    text = capsys.readouterr().out
    for key in (*Site.__dataclass_fields__, *(f"rules.<rule>.{name}" for name in RuleSite.__dataclass_fields__)):
        assert re.search(rf"^{re.escape(key)}: .+\n    \S", text, re.MULTILINE), key


def test_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert gpus_here({"CUDA_VISIBLE_DEVICES": "0, 2"}) == ("0", "2")
    assert gpus_here({"CUDA_VISIBLE_DEVICES": ""}) == ()
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: NVIDIA A100 (UUID: GPU-1)"; echo "GPU 1: NVIDIA A100 (UUID: GPU-2)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_here({}) == ("0", "1")
    program.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(ConfigError, match="mend the driver"):
        gpus_here({})
    program.unlink()
    assert gpus_here({}) == ()


def test_profiles_of_slurm_differ_in_arrays_alone():
    single, array = (
        yaml.safe_load((REPOSITORY / f"profiles/{name}/profile.yaml").read_text()) for name in ("slurm", "slurm-array")
    )
    differ = {key for key in single | array if single.get(key) != array.get(key)}
    assert differ == {"slurm-array-jobs", "slurm-array-limit", "jobs", "max-jobs-per-timespan"}
    assert single["slurm-status-command"] == "squeue" and "retries" in single
