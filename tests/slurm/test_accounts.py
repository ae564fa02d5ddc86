"""Accounts and QOS of a site, on a Slurm that has any: tests/slurm/cluster start with CIRCUITMILL_SLURM_DB=1."""

from pathlib import Path

import pytest
from tests.slurm.checkouts import copied
from tests.slurm.conftest import Slurm

pytestmark = pytest.mark.slow


@pytest.fixture
def accounts(slurm: Slurm) -> Slurm:
    """The cluster, with account `test` and QOS `normal` and `high`."""
    if "test" not in slurm.run("sacctmgr", "--noheader", "show", "account", "format=account", check=False).split():
        pytest.skip("this Slurm has no accounts; start it with CIRCUITMILL_SLURM_DB=1")
    return slurm


def test_jobs_have_the_account_and_qos_of_the_site(accounts: Slurm, tiny_run: Path, tmp_path: Path):
    site = {"account": "test", "qos": "high", "rules": {"run_tokenize": {"qos": "normal"}}}
    made = copied(tiny_run, tmp_path / "c", site, "tokenize", "calibrate")
    made.start("calibrate").finish()
    found = {}
    for job in accounts.jobs():
        if job.folder == str(made.folder):
            words = accounts.run("scontrol", "show", "job", job.id).split()
            found[job.comment] = {word for word in words if word.startswith(("Account=", "QOS="))}
    assert found == {
        "rule_run_tokenize": {"Account=test", "QOS=normal"},
        "rule_run_calibrate": {"Account=test", "QOS=high"},
    }


def test_an_account_that_is_not_ours_is_named(accounts: Slurm, tiny_run: Path, tmp_path: Path):
    made = copied(tiny_run, tmp_path / "c", {"account": "nobodys"}, "tokenize")
    run = made.start("tokenize")
    assert run.process.wait(300) != 0
    assert "nobodys" in run.said() and "account" in run.said()
    assert not [job for job in accounts.jobs() if job.folder == str(made.folder)]
