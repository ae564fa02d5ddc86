"""Reading Snakemake's log, on logs that it wrote: with Slurm, with Slurm until it was killed, and without."""

from pathlib import Path

import pytest

from circuitmill.cluster.snakemake_log import Task, parse_log, slurm_log

SAMPLES = Path(__file__).with_name("samples")
SLURM_LOGS = Path("/scratch/ada/circuitmill/.snakemake/slurm_logs")


def sample(name: str) -> str:
    return (SAMPLES / name).read_text()


def test_a_slurm_run_that_ended():
    log = parse_log(sample("slurm_ended.log"))
    assert log.run_id == "circuitmill_ee5134b3-8da1-4cb7-86ee-9c25064df1a5"
    assert log.ended
    assert log.task_of("4") == Task("cache_shard", {"shard": "train-0"})
    # both Slurm jobs of the job that was retried
    assert log.task_of("5") == log.task_of("7") == Task("bad_prompt", {"variant": "main", "prompt": "two_hop-00"})
    assert log.task_of("99") is None
    refused, failed = (log.failures[number] for number in (4, 3))
    assert set(log.failures) == {3, 4}  # the shards finished
    assert (refused.rule, refused.attempts, refused.retried, refused.slurm_job) == ("pend", 2, False, None)
    assert refused.message.startswith("Job submission failed with exception: The --node-constraints option")
    assert (failed.rule, failed.attempts, failed.retried, failed.slurm_job) == ("bad_prompt", 2, False, "7")
    assert failed.message.startswith("SLURM-job '7' failed, SLURM status is: 'FAILED'.")
    assert not failed.message.endswith("involved rule(s).")
    assert failed.logs == (
        Path("results/toy/logs/main/bad/two_hop-00.log"),
        SLURM_LOGS / "rule_bad_prompt/main_two_hop-00/7.log",
    )


def test_a_slurm_run_with_an_array_whose_controller_was_killed():
    log = parse_log(sample("array_killed.log"))
    assert not log.ended
    # tasks are numbered in the order in which the log lists Snakemake's jobs
    assert [log.task_of(f"117_{k}") for k in (1, 2, 3, 4)] == [
        Task("cache_shard", {"shard": f"train-{shard}"}) for shard in (1, 2, 3, 0)
    ]
    assert log.task_of("123_4") == log.task_of("117_4")
    assert {number: (one.slurm_job, one.attempts, one.retried) for number, one in log.failures.items()} == {
        5: ("116", 1, True),
        3: ("117_2", 1, True),
        4: ("117_3", 1, True),
        1: ("117_4", 1, True),
        2: (None, 1, True),
    }
    assert log.failures[2].message == "it ended well, but its output is not there"


def test_a_local_run():
    log = parse_log(sample("local_ended.log"))
    assert (log.run_id, log.submitted, log.ended) == (None, {}, True)
    assert {one.rule: (one.attempts, one.wildcards, one.message) for one in log.failures.values()} == {
        "cache_shard": (2, {"shard": "train-2"}, ""),
        "bad_prompt": (2, {"variant": "main", "prompt": "two_hop-00"}, ""),
    }


@pytest.mark.parametrize("name", ["slurm_ended.log", "array_killed.log", "local_ended.log"])
def test_any_beginning_of_a_log_can_be_read(name: str):
    text, whole = sample(name), parse_log(sample(name))
    for end in range(0, len(text), 37):
        log = parse_log(text[:end])
        assert log.tasks.keys() <= whole.tasks.keys()
        assert log.failures.keys() <= {1, 2, 3, 4, 5}


def test_a_shell_command_in_an_error_is_passed_over():
    text = """Error in rule train:
    message: None
    jobid: 7
    log: a.log, b.log (check log file(s) for error details)
    shell:
        python - <<END
print("    jobid: 8")
Finished jobid: 7 (Rule: train)
END
        (command exited with non-zero exit code)
    external_jobid: 12
Trying to restart job 7.
"""
    (failure,) = parse_log(text).failures.values()
    assert (failure.jobid, failure.slurm_job, failure.retried) == (7, "12", True)
    assert failure.logs == (Path("a.log"), Path("b.log"))
    (failure,) = parse_log(text * 2).failures.values()
    assert failure.attempts == 2
    assert not parse_log(text + "Finished jobid: 7 (Rule: train)\n").failures


def test_the_log_of_an_array_task_is_above_the_place_that_messages_name(tmp_path: Path):
    named = tmp_path / "rule_cache_shard" / "train-2" / "10_2.log"
    assert slurm_log(named, "10_2") == named  # neither is there
    above = tmp_path / "rule_cache_shard" / "10_2.log"
    above.parent.mkdir()
    above.touch()
    assert slurm_log(named, "10_2") == above
    named.parent.mkdir()
    named.touch()
    assert slurm_log(named, "10_2") == named
