import dataclasses

import pytest
import torch
from tests.core.coders import ROWS, random_transcoder, sizes_of, small, tokens_for

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.scaling import Scaling, fold
from circuitmill.core.transcoder import CLT
from circuitmill.errors import ConfigError, ShapeError
from circuitmill.stores.transcoders import ARCHITECTURE, as_clt, load_transcoder, save_transcoder

SHARED_BY_TARGETS = [row for row, form in ROWS.items() if form.decoder == "source"]
MIXTURES = [row for row, form in ROWS.items() if form.topology == "molt"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def scaling_of(coder, kind):
    torch.manual_seed(8)
    shape = (coder.n_layers, coder.d_model)
    like = coder.b_dec.detach()
    if kind == "rms":
        read, write = (like.new_empty(coder.n_layers).uniform_(0.2, 4) for _ in range(2))
        return Scaling.by_layer(read, write, coder.d_model)
    scales = [like.new_empty(shape).uniform_(0.2, 4) for _ in range(2)]
    return Scaling(*scales, *(like.new_empty(shape).normal_() for _ in range(2)))


def raw_of(coder, n_tokens=9):
    """Raw inputs of many sizes."""
    x = tokens_for(coder, n_tokens).to(coder.b_dec.dtype)
    return x * torch.logspace(-1, 1, coder.n_layers, dtype=x.dtype)[:, None] + 0.5


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", ["rms", "standardize"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_folded_on_raw_equals_unfolded_on_normalised(row, kind, dtype):
    coder = small(row, n_features=6, d_model=4).to(dtype)
    scaling = scaling_of(coder, kind)
    if kind == "standardize" and row in SHARED_BY_TARGETS + MIXTURES:
        with pytest.raises(ShapeError, match="train with scaling rms"):
            fold(coder, scaling)
        return
    raw = raw_of(coder)
    folded = fold(coder, scaling)
    x, tolerance = scaling.inputs(raw), TOLERANCE[dtype]
    scale = coder(x).abs().max().item()
    pre = coder.pre_activations(x)
    torch.testing.assert_close(folded.pre_activations(raw), pre, rtol=0, atol=tolerance * pre.abs().max().item())
    assert torch.equal(folded.threshold, coder.threshold)
    torch.testing.assert_close(scaling.outputs(folded(raw)), coder(x), rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(folded(raw), scaling.raw_outputs(coder(x)), rtol=0, atol=5 * tolerance * scale)


def test_a_center_alone_is_refused_for_transforms():
    coder = small("molt")
    plain = scaling_of(coder, "rms")
    assert fold(coder, plain).architecture == coder.architecture
    moved = dataclasses.replace(plain, input_center=torch.full_like(plain.input_center, 0.1))
    with pytest.raises(ShapeError, match=r"inputs with center zero for transforms.*\n  where: architecture\n"):
        fold(coder, moved)


@pytest.mark.parametrize("row", ROWS)
def test_folding_leaves_the_original_alone_and_says_what_it_made(row):
    coder = small(row)
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    folded = fold(coder, scaling_of(coder, "rms"))
    assert all(torch.equal(before[name], value) for name, value in coder.state_dict().items())
    changes = {"shared": 0, "pair_scale": coder.architecture.pair_scale or coder.architecture.decoder == "source"}
    assert folded.architecture == dataclasses.replace(coder.architecture, **changes)


def test_scaling_there_and_back():
    scaling = scaling_of(small("clt"), "standardize")
    y = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(scaling.raw_outputs(scaling.outputs(y)), y, rtol=0, atol=1e-12)
    moved = scaling.to(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, one.name), getattr(scaling, one.name)) for one in dataclasses.fields(Scaling))
    expected = (y - scaling.input_center) * scaling.input_scale
    assert torch.equal(scaling.inputs(y), expected)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("threshold", ["jumprelu", "relu"])
@torch.no_grad()
def test_a_saved_one_is_the_same_function(row, threshold, tmp_path):
    coder = small(row, n_features=6, d_model=4).float()
    if threshold == "relu":
        coder.log_threshold.fill_(-torch.inf)
    kind = "rms" if row in SHARED_BY_TARGETS + MIXTURES else "standardize"
    folded = fold(coder, scaling_of(coder, kind))
    raw = raw_of(folded)
    save_transcoder(tmp_path, folded, scan="scan", model_name="model")
    assert (tmp_path / ARCHITECTURE).is_file() == (folded.architecture != CLT)
    loaded = load_transcoder(tmp_path)
    assert loaded.architecture == folded.architecture
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(raw), folded(raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.threshold, folded.threshold)
    for name, parameter in loaded.named_parameters():
        if name != "log_threshold":
            assert torch.equal(parameter, dict(folded.named_parameters())[name]), name


@torch.no_grad()
def test_prefixes_do_not_change_how_a_transcoder_is_stored(tmp_path):
    coder = random_transcoder(2, 4, 3, architecture=ArchitectureConfig(prefixes=(1, 4))).float()
    save_transcoder(tmp_path, coder, scan="scan", model_name="model")
    assert not (tmp_path / ARCHITECTURE).exists()
    raw = raw_of(coder)
    torch.testing.assert_close(load_transcoder(tmp_path)(raw), coder(raw))


AS_CLT = {row: ROWS[row] for row in ("clt", "plt", "target", "source", "source scale", "low rank")} | {
    "target scale": ArchitectureConfig(decoder="target", pair_scale=True),
    "matryoshka": ArchitectureConfig(prefixes=(1, 3, 6)),
    "matryoshka plt": ArchitectureConfig("plt", prefixes=(1, 3, 6)),
}


@pytest.mark.parametrize("row", AS_CLT)
@torch.no_grad()
def test_as_clt_is_the_same_function(row):
    sizes = sizes_of(AS_CLT[row], 3, 6, 4)
    coder = fold(
        random_transcoder(*sizes, architecture=AS_CLT[row]), scaling_of(small("clt", n_layers=3, d_model=4), "rms")
    )
    coder = coder.float()
    clt = as_clt(coder)
    assert clt.architecture == CLT
    raw = raw_of(coder)
    torch.testing.assert_close(clt.encode(raw), coder.encode(raw), rtol=1e-6, atol=0)
    torch.testing.assert_close(clt(raw), coder(raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clt.decoder_norms(), coder.decoder_norms(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("acausal", "topology acausal does not replace MLPs in the order of layers"),
        ("sae", "topology sae does not replace MLPs"),
        ("crosscoder", "topology crosscoder does not replace MLPs"),
        ("crosscoder shared", "topology crosscoder does not replace MLPs"),
        ("molt", "topology molt does not replace MLPs in the order of layers by sums of features"),
        ("clt skip", "the linear skip connection has no place in a graph of features"),
        ("plt skip", "the linear skip connection"),
        ("target pairs", "offsets on active features are not linear in the activation"),
        ("source offset", "offsets on active features"),
    ],
)
def test_what_is_no_clt_is_refused_with_the_reason(row, reason):
    with pytest.raises(ConfigError, match=rf"found {reason}.*\n  where: train.architecture\n"):
        as_clt(small(row))


def test_every_row_is_a_clt_or_says_why_not():
    for row, form in ROWS.items():
        if form.untraceable:
            with pytest.raises(ConfigError):
                as_clt(small(row))
        else:
            assert as_clt(small(row)).architecture == CLT
