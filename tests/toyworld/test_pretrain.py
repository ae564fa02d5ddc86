import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.toyworld.conftest import replace
from transformers import PreTrainedTokenizerFast

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.stores.manifest import StageOutput
from circuitmill.toyworld.measure import token_stream
from circuitmill.toyworld.pretrain import Pretraining, Windows, next_token_loss, pretrain
from circuitmill.toyworld.transformer import key_query_scale, make_transformer


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerFast, documents: list[str], tiny_cfg: ToyworldConfig) -> Windows:
    stream = token_stream(tokenizer, documents[:2000])
    return Windows(stream, bos_id=tokenizer.bos_token_id, context=tiny_cfg.transformer.context, seed=0)


@pytest.fixture
def start(tiny_cfg: ToyworldConfig, tokenizer: PreTrainedTokenizerFast):
    def make(cfg: ToyworldConfig = tiny_cfg, *, extension: int = 0) -> Pretraining:
        model = make_transformer(cfg.transformer, d_vocab=len(tokenizer), bos_id=256, seed=cfg.seed)
        scale = key_query_scale(cfg.transformer)
        return Pretraining(model, cfg.pretrain, key_query_scale=scale, extension=extension)

    return make


def same_state(one: Pretraining, two: Pretraining) -> bool:
    a, b = one.state(), two.state()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ["gpt_neo", "qwen2"])
def test_a_broken_off_run_continues_bit_for_bit(
    architecture: str, start, windows: Windows, tiny_cfg: ToyworldConfig, tmp_path: Path
):
    cfg = replace(tiny_cfg, transformer={"architecture": architecture})
    straight = start(cfg)
    pretrain(straight, windows, StageOutput("toyworld", cfg, {}, tmp_path / "straight"))
    every = cfg.pretrain.checkpoint_tokens // cfg.pretrain.batch_tokens

    broken = start(cfg)
    stop = 2 * every + 2
    out = tmp_path / "broken"
    pretrain(broken, windows, StageOutput("toyworld", cfg, {}, out), interrupt=lambda: broken.done == stop)
    assert broken.done == stop < straight.done
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{2 * every:08d}.safetensors"]

    continued = start(cfg)
    first = []
    output = StageOutput("toyworld", cfg, {}, out)
    pretrain(continued, windows, output, interrupt=lambda: first.append(continued.done) or False)
    assert first[0] == 2 * every + 1, "it went on from the checkpoint"
    assert same_state(straight, continued)
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "straight" / "metrics.jsonl").read_text()


def test_another_configuration_starts_anew(start, windows: Windows, tiny_cfg: ToyworldConfig, tmp_path: Path):
    run = start()
    pretrain(run, windows, StageOutput("toyworld", tiny_cfg, {}, tmp_path), interrupt=lambda: run.done == 9)
    output = StageOutput("toyworld", replace(tiny_cfg, pretrain={"clip": 2.0}), {}, tmp_path)
    assert output.ledger.get("checkpoint") is None
    assert not (tmp_path / "checkpoints").exists()


def test_it_learns_and_says_so(start, windows: Windows, tiny_cfg: ToyworldConfig, tmp_path: Path):
    run = start()
    pretrain(run, windows, StageOutput("toyworld", tiny_cfg, {}, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [4096, 8192, 12288]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert not run.model.training


def test_a_loss_that_is_not_finite_stops_before_the_update(start, windows: Windows):
    run = start()
    with torch.no_grad():
        run.model.get_input_embeddings().weight[256] = float("inf")
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    with pytest.raises(DivergedError, match=r"finite loss; found (nan|inf)\n.*update 1 of 24\n.*lr_attention"):
        run.update(windows.batch(0, 4))
    after = run.state()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_rates_rise_stay_and_fall(start, tiny_cfg: ToyworldConfig):
    run, cfg = start(), tiny_cfg.pretrain
    assert run.rate(0) == cfg.batch_tokens / cfg.warmup_tokens
    assert run.rate(cfg.warmup_tokens) == 1
    assert run.rate(int(0.39 * cfg.tokens)) == 1
    assert run.rate(int(0.7 * cfg.tokens)) == pytest.approx(0.5, abs=0.01)
    assert run.rate(cfg.tokens) == cfg.final_lr


def test_an_extension_begins_with_the_weights_and_the_batches_that_come_next(
    start, windows: Windows, tiny_cfg: ToyworldConfig, tmp_path: Path
):
    output = StageOutput("toyworld", tiny_cfg, {}, tmp_path)
    run = start()
    pretrain(run, windows, output)
    extended = start(extension=1)
    pretrain(extended, windows, output)
    assert (run.done, extended.first, extended.done) == (24, 24, 32)

    by_hand = start(extension=1)  # optimizers that have seen nothing
    by_hand.load_weights(run.state())
    for number in range(24, 32):
        by_hand.update(windows.batch(number, 16))
    assert same_state(by_hand, extended)


def test_rates_of_an_extension_rise_to_a_share_and_fall(start, tiny_cfg: ToyworldConfig):
    longer = replace(tiny_cfg, pretrain={"extension_tokens": 40_960, "extension_rate": 0.3})
    run, cfg = start(longer, extension=2), longer.pretrain
    first = cfg.tokens + cfg.extension_tokens
    assert run.first * cfg.batch_tokens == first
    assert run.rate(first) == pytest.approx(0.3 * cfg.batch_tokens / cfg.warmup_tokens)
    assert run.rate(first + cfg.extension_tokens // 2) == pytest.approx((0.3 + cfg.final_lr) / 2)
    assert run.rate(first + cfg.extension_tokens) == pytest.approx(cfg.final_lr)


def test_muon_has_the_matrices_and_smaller_rates_for_keys_and_queries(start):
    run = start()
    muon, adamw = run._optimizers["muon"], run._optimizers["adamw"]
    names = {id(weight): name for name, weight in run.model.named_parameters()}
    mlp, attention, key_query = ([names[id(weight)] for weight in group["params"]] for group in muon.param_groups)
    assert {name.split(".")[-2] for name in mlp} == {"c_fc", "c_proj"}
    assert {name.split(".")[-2] for name in attention} == {"v_proj", "out_proj"}
    assert {name.split(".")[-2] for name in key_query} == {"q_proj", "k_proj"}
    rest = [names[id(weight)] for weight in adamw.param_groups[0]["params"]]
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(rest)
    assert sorted(mlp + attention + key_query + rest) == sorted(names.values())


def test_batches_begin_at_documents_and_depend_on_seed_and_number_alone():
    stream = np.array([9, 1, 2, 9, 3, 9, 4, 5, 6, 9], dtype=np.int32)
    windows = Windows(stream, bos_id=9, context=4, seed=1)
    batch = windows.batch(5, 200)
    assert {tuple(row) for row in batch.tolist()} == {(9, 1, 2, 9), (9, 3, 9, 4), (9, 4, 5, 6)}
    assert torch.equal(batch, Windows(stream, bos_id=9, context=4, seed=1).batch(5, 200))
    assert not torch.equal(batch, windows.batch(6, 200))
    assert not torch.equal(batch, Windows(stream, bos_id=9, context=4, seed=2).batch(5, 200))


def test_too_little_text_is_an_error():
    with pytest.raises(ConfigError, match=r"one context \(8 tokens\); found 3 tokens\n.*corpus.documents"):
        Windows(np.array([9, 1, 2], dtype=np.int32), bos_id=9, context=8, seed=0)


def test_loss_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]]])
    tokens = torch.tensor([[1, 0, 1]])
    by_hand = (np.log(2) + np.log(1 + np.exp(2.0))) / 2
    assert next_token_loss(logits, tokens).item() == pytest.approx(by_hand)
