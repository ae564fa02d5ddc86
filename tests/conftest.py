"""Fixtures that several folders share. No test may reach the network or a GPU unless it is marked so."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST = "tests/slurm/test_faults.py"
"""It waits for minutes: no worker should be left with it at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fix` rewrites generated pages instead of complaining about them."""
    parser.addoption("--fix", action="store_true", help="rewrite the generated pages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, the others in the order of their names."""
    items.sort(key=lambda item: item.location[0] != LONGEST)


def make_tiny_model(folder: Path, *, vocabulary: int = 300, context: int = 32) -> Path:
    """A random two-layer GPT-Neo with a byte-level tokenizer whose BOS id is 1, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<|pad|>": 0, "<|endoftext|>": 1} | {character: 2 + i for i, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        window_size=4,
        attention_types=[[["local"], 1], [["global"], 1]],
        activation_function="gelu_new",
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    GPTNeoForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-Neo folder: d_model 16, context 32, bytes as tokens, BOS id 1."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A checkout-like folder in which the whole workflow ran with `experiment=tiny`: real stages, smallest sizes.

    Workers share it: the first to come makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "checkout"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            _run_tiny(folder)
            (folder / "done").touch()
    return folder


def _run_tiny(folder: Path) -> None:
    folder.mkdir()
    for name in ("workflow", "profiles", "config", "envs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy(REPOSITORY / "Snakefile", folder)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "all", "--config", "run=tiny"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
