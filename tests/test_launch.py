"""What a launcher would start, and from which variables it knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from circuitmill import cli, launch
from circuitmill.agent import Ending
from circuitmill.config.deployment import EXPECTED, revisions
from circuitmill.errors import ConfigError
from circuitmill.launch import Place, place, ranks_per_node, srun, torchrun_arguments

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[7-8]",
}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        {**STEP, "SLURM_STEP_NUM_NODES": "1"},
    ],
    ids=["no Slurm", "inside Snakemake's job", "one node", "a step on one of two nodes"],
)
def test_one_node(env: dict[str, str]):
    assert place(env) == Place()


def test_a_node_of_several():
    expected = Place(nodes=2, node=1, master="n7", port=20000 + 123456 % 20000)
    assert place(STEP) == expected
    other = {key: value for key, value in STEP.items() if key not in ("SLURM_NNODES", "SLURM_STEP_NODELIST")}
    assert place({**other, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}) == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"SLURM_NNODES": "two"}, "SLURM_NNODES"),
        ({"SLURM_STEP_ID": None}, "SLURM_STEP_ID"),
        ({"SLURM_NODEID": None}, "SLURM_NODEID"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST"),
        ({"SLURM_STEP_NODELIST": "m1"}, "SLURM_STEP_NODELIST=m1"),
        ({"SLURM_STEP_NODELIST": "m[1"}, "SLURM_STEP_NODELIST"),
        ({"SLURM_NNODES": "3", "SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NODELIST=n[7-8]"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID"),
    ],
)
def test_variables_that_do_not_fit_are_named(changes: dict[str, str | None], key: str):
    env = {name: value for name, value in (STEP | changes).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        place(env)
    assert caught.value.where == key
    assert "srun" in caught.value.fix


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("n7", ["n7"]),
        ("n[7-8]", ["n7", "n8"]),
        ("n[08-10,3],login-1", ["n08", "n09", "n10", "n3", "login-1"]),
        ("rack[1-2]-gpu[001-002]", ["rack1-gpu001", "rack1-gpu002", "rack2-gpu001", "rack2-gpu002"]),
        ("a.b[1],c", ["a.b1", "c"]),
    ],
)
def test_lists_of_nodes(listed: str, expected: list[str]):
    assert launch.hosts(listed) == expected


@pytest.mark.parametrize("listed", ["", "n[7-8", "n[a-b]", "n 7", "n[7-8]]"])
def test_what_is_no_list_of_nodes(listed: str):
    with pytest.raises(ValueError, match="no list of nodes"):
        launch.hosts(listed)


def options(arguments: list[str]) -> dict[str, str]:
    before = arguments[: arguments.index("-m")]
    return dict(zip(before[::2], before[1::2], strict=True))


def test_one_node_meets_at_a_store_of_its_own():
    arguments = torchrun_arguments(Place(), 4, ["train", "--out", "x"])
    assert arguments[arguments.index("-m") :] == ["-m", "circuitmill", "train", "--out", "x"]
    given = options(arguments)
    assert given["--nproc-per-node"] == "4" and given["--max-restarts"] == "0"
    assert given["--rdzv-backend"] == "c10d" and given["--rdzv-endpoint"] == "localhost:0"
    # two on one machine do not meet
    assert given["--rdzv-id"] != options(torchrun_arguments(Place(), 4, ["train"]))["--rdzv-id"]


def test_several_nodes_meet_at_the_first():
    given = options(torchrun_arguments(Place(nodes=2, node=1, master="n7", port=23456), 4, ["train"]))
    expected = {"--nnodes": "2", "--node-rank": "1", "--master-addr": "n7", "--master-port": "23456"}
    assert expected.items() <= given.items() and "--rdzv-backend" not in given


def test_torchrun_understands_both():
    from torch.distributed.run import config_from_args, parse_args

    for here in (Place(), Place(2, 1, "n7", 23456)):
        config, _, command = config_from_args(parse_args(torchrun_arguments(here, 1, ["train", "--out", "x"])))
        assert (config.min_nodes, config.max_nodes) == (here.nodes, here.nodes)
        assert command == ["-u", "-m", "circuitmill", "train", "--out", "x"]
        assert "SIGTERM" not in config.signals_to_handle


@pytest.mark.parametrize(
    ("resources", "ranks", "step"),
    [
        ({"gpu": 0}, 1, ""),
        ({"gpu": 4, "nodes": 1}, 4, ""),
        ({"gpu": 0, "nodes": 2}, 1, "srun -N 2 -n 2 --cpus-per-task=1"),
        (
            {"gpu": 0, "gres": "gpu:a100:8", "nodes": 4, "cpus_per_task": 32},
            8,
            "srun -N 4 -n 4 --cpus-per-task=32 --gres=gpu:a100:8",
        ),
        ({"gpu": 0, "gres": "gpu:2"}, 2, ""),
        ({"gpu": 0, "gres": "gpu:a100"}, 1, ""),
        ({"gpu": 0, "gres": "shard:5,gpu:3"}, 3, ""),
        ({"gpu": 0, "gres": "license:3"}, 1, ""),
    ],
)
def test_a_job_s_resources_decide(resources: dict, ranks: int, step: str):
    assert ranks_per_node(resources) == ranks
    assert srun(resources) == step


def test_a_container_starts_behind_srun_on_every_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    resources = {"nodes": 2, "cpus_per_task": 3}
    step = "srun -N 2 -n 2 --cpus-per-task=3"
    assert srun(resources, "a b.sif", "--nv") == f"{step} apptainer exec --home {tmp_path} --nv 'a b.sif'"
    assert srun(resources, "x.sif") == f"{step} apptainer exec --home {tmp_path} x.sif"
    # on one node Snakemake starts it
    assert srun({"nodes": 1}, "x.sif") == ""


def test_an_image_of_other_code_launches_nothing(monkeypatch: pytest.MonkeyPatch):
    """Behind srun nothing else compares the two."""
    from circuitmill import agent

    monkeypatch.setattr(agent, "run", lambda *_, **__: Ending())
    assert launch.launch(["train"], env={EXPECTED: revisions()}) == Ending()
    with pytest.raises(ConfigError, match=rf"an image with 0.0.1 train:1; found {revisions()}\n.*\n.*containers/build"):
        launch.launch(["train"], env={EXPECTED: "0.0.1 train:1"})


@pytest.mark.parametrize(("threads", "expected"), [(8, "4"), (1, "1"), (None, "3")])
def test_ranks_share_out_the_threads_of_a_node(
    threads: int | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from circuitmill import agent

    seen = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(agent, "run", lambda *_, **__: seen.append(os.environ["OMP_NUM_THREADS"]) or Ending())
    launch.launch(["train"], per_node=2, threads=threads, env={})
    assert seen == [expected]


@pytest.mark.parametrize(
    ("given", "where"), [([], "launch"), (["--per-node", "0", "train"], "--per-node"), (["--per-node", "2"], "launch")]
)
def test_what_cannot_be_launched(given: list[str], where: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["launch", *given]) == 2
    assert f"where: {where}\n" in capsys.readouterr().err


def test_command_line_passes_everything_after_the_subcommand_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = []

    def take(command, per_node, threads):
        calls.append((command, per_node, threads))
        return Ending(75, "rank 0 on here ended with exit code 75")

    monkeypatch.setattr(launch, "launch", take)
    assert (
        cli.main(["launch", "--per-node", "2", "--threads", "8", "train", "--per-node", "3", "--verbose", "--out", "x"])
        == 75
    )
    assert cli.main(["launch", "train", "a=1"]) == 75
    first = (["train", "--per-node", "3", "--verbose", "--out", "x"], 2, 8)
    assert calls == [first, (["train", "a=1"], None, None)]
    assert capsys.readouterr().err.startswith("circuitmill launch: rank 0 on here ended with exit code 75\n")


def test_asking_for_help_or_for_the_impossible_imports_no_torch():
    code = "import sys; from circuitmill import cli, launch; cli.main(['launch'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
