import copy
import json
import math

import pytest
import torch
from tests.training.helpers import D_MODEL, N_LAYERS, Memory, fresh, scaling, tiny

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.config.train import NonlinearityConfig, TermConfig
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.core.transcoder import Transcoder
from circuitmill.stores.metrics import read_metrics
from circuitmill.training.heldout import HeldOut, between_models, finished, log10_histogram, relations, usage_entropy
from circuitmill.training.monitor import MetricsFile
from circuitmill.training.state import make_state

TOP_K = {name: NonlinearityConfig(name, k=2.0) for name in NONLINEARITIES if name not in ("relu", "jumprelu")}
LOSS = {"reconstruction": TermConfig(1.0)}


def pairs(n_batches=3, first=100):
    """Normalised batches that no training of the tests sees."""
    source = Memory()
    raw = [source.pair(index) for index in range(first, first + n_batches)]
    return [(scaling().inputs(x), scaling().outputs(y)) for x, y in raw]


def underway(cfg):
    """A training with parameters and counters that are nobody's starting values."""
    state, generator = fresh(cfg), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in state.transcoder.parameters():
            if parameter.isfinite().all():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    state.step = 10
    state.density.uniform_(generator=generator)
    state.idle.random_(2 * cfg.dead_tokens, generator=generator)
    state.least[:] = torch.tensor([0.4, 0.6])
    return state


def held_out(cfg, **options):
    return HeldOut(pairs(), cfg, scaling=scaling(), **options)


def activations(state, cfg):
    """Of the held-out batches, by the nonlinearity as it stands in the table."""
    row, settings = NONLINEARITIES[cfg.nonlinearity.name], Settings(k=cfg.nonlinearity.k)
    coder = state.transcoder
    return [row(coder.pre_activations(x), coder.log_threshold, settings).detach() for x, _ in pairs()]


@pytest.mark.parametrize("name", ["relu", "jumprelu", *TOP_K])
def test_fit_and_sparsity_are_those_of_the_training_nonlinearity(name):
    cfg = tiny(nonlinearity=TOP_K.get(name, NonlinearityConfig(name)), loss=LOSS)
    state = underway(cfg)
    row = held_out(cfg).measure(state)
    found = activations(state, cfg)
    a, x, y = torch.cat(found), *(torch.cat(side) for side in zip(*pairs(), strict=True))
    errors = (y - state.transcoder.decode(a, x).detach()).double().square().sum(dim=2)
    deviations = (y - y.mean(dim=0)).double().square().sum(dim=2)
    assert row["heldout_ev"] == pytest.approx(float(1 - errors.sum() / deviations.sum()), abs=1e-5)
    per_layer = 1 - errors.sum(dim=0) / deviations.sum(dim=0)
    assert row["heldout_ev_per_layer"] == pytest.approx(per_layer.tolist(), abs=1e-5)
    counts = (a > 0).sum(dim=2)
    assert row["heldout_l0"] == pytest.approx(counts.double().mean(dim=0).tolist())
    ordered = counts.sort(dim=0).values
    for key, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95)):
        expected = ordered[math.ceil(share * len(ordered)) - 1].tolist()
        assert row["heldout_l0_percentiles"][key] == expected
    assert len(set(counts.flatten().tolist())) > 1 or name in ("topk", "groupmax")


def test_k_is_that_of_the_moment():
    cfg = tiny(nonlinearity=NonlinearityConfig("topk", k=2.0, k_start=10.0, k_ramp_share=1.0), loss=LOSS)
    state = fresh(cfg)
    with torch.no_grad():
        state.transcoder.b_enc.fill_(100.0)
    state.step = cfg.steps // 2
    assert held_out(cfg).measure(state)["heldout_l0"] == [6.0] * N_LAYERS


def test_measuring_changes_nothing():
    cfg = tiny(dead_tokens=320)
    state = underway(cfg)
    measured = held_out(cfg, replaced=lambda transcoder: {})
    before, random = copy.deepcopy(state.tensors()), torch.get_rng_state()
    first = measured.measure(state)
    assert first == measured.measure(state)
    assert torch.equal(torch.get_rng_state(), random)
    after = state.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not [name for name, p in state.transcoder.named_parameters() if p.grad is not None]


def test_counters_come_from_the_state():
    cfg = tiny(dead_tokens=1000)
    state = fresh(cfg)
    state.idle[0, :3] = 1000
    state.idle[1, 5] = 999
    state.density[0, :4] = torch.tensor([0.5, 0.05, 0.0004, 1.0])
    row = held_out(cfg).measure(state)
    assert row["dead_features"] == [3, 0] and row["dead"] == pytest.approx(3 / 32)
    histogram = row["density_histogram"]
    edges, (ours, other) = histogram["log10_edges"], histogram["counts"]
    assert edges[0] == -3 and edges[-1] == 0 and len(ours) == len(edges) - 1
    # less than half a firing in the window is none
    assert sum(ours) == 3 and sum(other) == 0
    assert ours[-1] == 1 and ours[edges.index(-0.4)] == 1 and ours[edges.index(-1.4)] == 1


def test_thresholds_only_where_they_are_trained():
    row = held_out(tiny()).measure(fresh(tiny()))
    histogram = row["threshold_histogram"]
    # every one starts at .1, an edge
    assert histogram == {"log10_edges": [-1.0, -0.8], "counts": [[16], [16]]}
    cfg = tiny(nonlinearity=TOP_K["batch_topk"], loss=LOSS)
    assert "threshold_histogram" not in held_out(cfg).measure(fresh(cfg))


def test_decoder_norms_are_concatenated_and_zero_is_no_length():
    cfg = tiny(init__zero_decoder=True)
    state = fresh(cfg)
    assert held_out(cfg).measure(state)["decoder_norm_histogram"] is None
    with torch.no_grad():
        # 3 to one layer and 4 to the other make 5
        state.transcoder.W_dec[0][0, :, 0] = torch.tensor([3.0, 4.0])
        state.transcoder.W_dec[1][1, 0, 0] = 1.0
    histogram = held_out(cfg).measure(state)["decoder_norm_histogram"]
    assert histogram["log10_edges"] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert histogram["counts"] == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_a_wide_range_ends_in_the_first_bar():
    histogram = log10_histogram(torch.tensor([[1e-30, 1.0, math.inf, -1.0]]))
    assert len(histogram["counts"][0]) == 60 and histogram["log10_edges"][0] == pytest.approx(-11.8)
    assert histogram["counts"][0][0] == 1 and histogram["counts"][0][-1] == 1 and sum(histogram["counts"][0]) == 2


def crosscoder(*, n_layers=4, models=2, shared=0):
    form = ArchitectureConfig("crosscoder", models=models, shared=shared)
    return Transcoder(n_layers, 6, 3, form)


def test_a_crosscoder_compares_models():
    coder = crosscoder()
    with torch.no_grad():
        # layers 0 and 1 are the first model's, 2 and 3 the second's
        block = coder.W_dec[0]
        block[0, 0, 0] = 3.0  # the first model's alone
        block[1, 3, 1] = 2.0  # the second's
        block[2, :, 2] = 1.0  # the same
        block[3, 0, 0], block[3, 2, 0] = 1.0, -1.0  # opposite
        block[4, 0, 0], block[4, 1, 0], block[4, 2, 0] = 4.0, 3.0, 1.0  # r = 1/6, cosine .8
    row = between_models(*relations(coder))
    relative, cosine = row["relative_norm_histogram"], row["cosine_histogram"]
    assert relative["names"] == ["model 1"]
    (counts,) = relative["counts"]
    # feature 5 writes nothing
    assert {edge: n for edge, n in zip(relative["edges"], counts, strict=False) if n} == {
        0.0: 1,
        0.15: 1,
        0.5: 2,
        0.95: 1,
    }
    assert cosine["names"] == ["shared", "exclusive"]
    shared, exclusive = (
        {edge: n for edge, n in zip(cosine["edges"], row, strict=False) if n} for row in cosine["counts"]
    )
    assert shared == {-1.0: 1, 0.9: 1} and exclusive == {0.8: 1}


def test_tied_decoders_are_shared_and_every_further_model_has_its_bars():
    coder = crosscoder(n_layers=3, models=3, shared=6)
    with torch.no_grad():
        coder.decoder.W_shared.normal_(generator=torch.Generator().manual_seed(1))
    row = between_models(*relations(coder))
    assert row["relative_norm_histogram"]["names"] == ["model 1", "model 2"]
    assert [counts[10] for counts in row["relative_norm_histogram"]["counts"]] == [6, 6]
    assert row["cosine_histogram"]["counts"][0][-1] == 12 and sum(row["cosine_histogram"]["counts"][1]) == 0


def test_a_crosscoder_is_measured_over_all_its_layers():
    form = ArchitectureConfig("crosscoder", models=2, shared=4)
    cfg = tiny(architecture=form, loss=LOSS)
    row = held_out(cfg).measure(fresh(cfg))
    assert len(row["heldout_l0"]) == 1 and len(row["heldout_ev_per_layer"]) == N_LAYERS
    assert sum(row["relative_norm_histogram"]["counts"][0]) == cfg.n_features
    assert sum(map(sum, row["cosine_histogram"]["counts"])) == cfg.n_features
    assert "relative_norm_histogram" not in held_out(tiny()).measure(fresh(tiny()))


def test_a_mixture_reports_how_evenly_transforms_are_used():
    form = ArchitectureConfig("molt", ranks=(2, 1))
    cfg = tiny(architecture=form, n_features=6, loss=LOSS, init__l0=2.0)
    state = fresh(cfg)
    with torch.no_grad():
        state.transcoder.b_enc[:] = torch.tensor([[9.0] * 6, [9.0] + [-99.0] * 5])
        state.transcoder.W_enc.zero_()
    even, collapsed = held_out(cfg).measure(state)["heldout_usage_entropy"]
    assert even == pytest.approx(math.log(6)) and collapsed == 0
    with torch.no_grad():
        state.transcoder.b_enc[1] = -99.0
    assert held_out(cfg).measure(state)["heldout_usage_entropy"][1] is None
    assert usage_entropy(torch.tensor([[3, 1]])).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk", "batch_topk_all"])
def test_finished_reads_and_writes_raw_units_with_a_threshold_per_feature(name):
    cfg = tiny(nonlinearity=TOP_K.get(name, NonlinearityConfig(name)), loss=LOSS)
    state = underway(cfg)
    before = copy.deepcopy(state.transcoder.state_dict())
    done = finished(state, cfg, scaling())
    x, _ = Memory().pair(100)
    pre = state.transcoder.pre_activations(scaling().inputs(x))
    thresholds = {"relu": torch.zeros(N_LAYERS, 1), "jumprelu": state.transcoder.threshold}
    threshold = thresholds.get(name, state.least[:, None])
    a = torch.where(pre > threshold, pre, 0.0)
    torch.testing.assert_close(done.encode(x), a, rtol=1e-5, atol=1e-5)
    expected = scaling().raw_outputs(state.transcoder.decode(a))
    torch.testing.assert_close(done(x), expected, rtol=1e-4, atol=1e-4)
    assert name in ("relu", "jumprelu") or (threshold > 0).all()
    assert all(torch.equal(value, before[key]) for key, value in state.transcoder.state_dict().items())


def test_the_replacement_model_is_measured_with_the_finished_transcoder(tmp_path):
    cfg = tiny(nonlinearity=TOP_K["topk"], loss=LOSS)
    state = underway(cfg)
    seen = []

    def replaced(transcoder):
        seen.append(transcoder)
        return {"agreement": 0.5, "kl": math.nan}

    row = held_out(cfg, replaced=replaced).measure(state)
    assert row["replacement_agreement"] == 0.5
    expected = finished(state, cfg, scaling(), pairs()).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in seen[0].state_dict().items())
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.log({"step": state.step} | row)
    file.close()
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read == json.loads(json.dumps({"step": state.step} | row | {"replacement_kl": None}))


def test_without_tokens_only_the_replacement_model_is_measured():
    state = make_state(tiny(), Transcoder(N_LAYERS, 16, D_MODEL))
    alone = HeldOut([], tiny(), scaling=scaling(), replaced=lambda transcoder: {"kl": 0.25})
    assert alone.measure(state) == {"replacement_kl": 0.25}
    assert HeldOut([], tiny(), scaling=scaling()).measure(state) == {}
