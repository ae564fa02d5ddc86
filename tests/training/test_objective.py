import pytest
import torch
from tests.core import reference
from tests.core.test_transcoder import random_transcoder
from tests.training.helpers import tiny

from circuitmill.config.train import TermConfig
from circuitmill.core.losses import auxiliary
from circuitmill.errors import ShapeError
from circuitmill.training import objective


@pytest.fixture
def clt():
    return random_transcoder(2, 4, 3)


@pytest.fixture
def pair():
    torch.manual_seed(3)
    return torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)


NONE_DEAD = torch.zeros(2, 4, dtype=torch.bool)


def at(share, dead=NONE_DEAD):
    """A moment of the training at which terms with a ramp have this share of their coefficient."""
    return objective.Moment(int(share * tiny().tokens), dead, torch.zeros(2, 4))


def result_of(clt, pair, cfg, dead=NONE_DEAD):
    return objective.evaluate_batch(clt, *pair, cfg, at(0.5, dead))


def gradients(clt, loss):
    return torch.autograd.grad(loss, list(clt.parameters()))


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_terms_equal_the_double_loop(clt, pair, way):
    cfg = tiny(loss__tanh_sparsity=TermConfig(1.4, 1.0, scale=1.3), products=way)
    result = result_of(clt, pair, cfg)
    pre, a = reference.encode(clt, pair[0])
    expected = {
        "reconstruction": reference.reconstruction(pair[1], reference.decode(clt, a)),
        "tanh_sparsity": reference.tanh_sparsity(clt, a, 1.3),
        "pre_activation": reference.pre_activation(clt, pre),
    }
    for name, value in expected.items():
        assert result.terms[name].item() == pytest.approx(value.item(), abs=1e-8)
    total = expected["reconstruction"] + 0.7 * expected["tanh_sparsity"] + 1e-3 * expected["pre_activation"]
    assert result.loss.item() == pytest.approx(total.item(), abs=1e-8)
    assert result.firings.tolist() == (a > 0).sum(dim=0).tolist()
    assert result.l0.tolist() == pytest.approx((a > 0).double().sum(dim=2).mean(dim=0).tolist())


def test_sparse_and_dense_way_have_the_same_gradients(clt, pair):
    found = []
    for way in ("sparse", "dense"):
        result = result_of(clt, pair, tiny(products=way))
        assert result.sparse == (way == "sparse",) * 2
        found.append(gradients(clt, result.loss))
    for one, other in zip(*found, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", [5])
def test_gradient_of_a_batch_is_the_mean_over_its_parts(clt, pair, parts):
    dead = torch.tensor([[True, False, False, True], [False, False, True, False]])

    def of(rows):
        part = [side[rows] for side in pair]
        return gradients(clt, result_of(clt, part, tiny(), dead).loss)

    whole = of(slice(None))
    split = [of(slice(k, k + 1)) for k in range(parts)]
    for index, gradient in enumerate(whole):
        torch.testing.assert_close(sum(part[index] for part in split) / parts, gradient, rtol=1e-6, atol=1e-10)


def explained(clt, pair, dead, k):
    batch = objective.evaluation(clt, *pair, tiny(), at(0.5, dead))
    return batch, auxiliary(batch, TermConfig(1.0, k=k))


def test_auxiliary_term_asks_dead_features_for_the_error(clt, pair):
    dead = torch.tensor([[True, True, False, False], [False, True, True, False]])
    pre, a = reference.encode(clt, pair[0])
    error = pair[1] - reference.decode(clt, a)
    kept = torch.where(dead, pre.relu(), 0.0)
    kept = torch.where(kept == kept.max(dim=2, keepdim=True).values, kept, 0.0)
    error_hat = reference.decode(clt, kept) - clt.b_dec
    _, ours = explained(clt, pair, dead, k=1)
    torch.testing.assert_close(ours, (error - error_hat).square().sum() / 5, rtol=0, atol=1e-8)
    _, few = explained(clt, pair, dead, k=4)
    with_all = reference.decode(clt, torch.where(dead, pre.relu(), 0.0)) - clt.b_dec
    torch.testing.assert_close(few, 4 / 8 * (error - with_all).square().sum() / 5, rtol=0, atol=1e-8)


def test_auxiliary_gradient_reaches_dead_features_only(clt, pair):
    dead = torch.zeros(2, 4, dtype=torch.bool)
    dead[1, 2] = True
    _, loss = explained(clt, pair, dead, k=4)
    (gradient,) = torch.autograd.grad(loss, clt.W_enc)
    assert gradient[1, 2].abs().sum() > 0
    gradient[1, 2] = 0
    assert not gradient.any()


class Whole:
    """Stands for sequences and the model that reads them: terms that are simple functions of the transcoder."""

    def __init__(self, share=1.0):
        self.share, self.asked = share, []

    def terms(self, transcoder, encode, names, parts):
        self.asked.append(list(names))
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        written = transcoder.decode_layer(0, encode(0, x).dense())
        return {"kl": written.square().sum(), "cross_entropy": transcoder.b_dec.square().sum()}


def end_to_end(**terms):
    return tiny(loss={"reconstruction": TermConfig(2.0), **terms})


def test_end_to_end_terms_come_from_the_whole_sequences(clt, pair):
    cfg, whole = end_to_end(cross_entropy=TermConfig(0.5), other=TermConfig(0.25, term="kl")), Whole()
    result = objective.evaluate_batch(clt, *pair, cfg, at(0.5), whole)
    plain = objective.evaluate_batch(clt, *pair, end_to_end(), at(0.5))
    encode = objective.encoder(clt, cfg, at(0.5))
    expected = whole.terms(clt, encode, [], None)
    assert whole.asked[0] == ["cross_entropy", "kl"]
    assert list(result.terms) == ["reconstruction", "cross_entropy", "other"]
    assert result.terms["other"].item() == pytest.approx(expected["kl"].item())
    total = plain.loss + 0.5 * expected["cross_entropy"] + 0.25 * expected["kl"]
    for one, other in zip(gradients(clt, result.loss), gradients(clt, total), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(result.loss, total)


def test_the_encoder_is_that_of_the_evaluation(clt, pair):
    for way in ("sparse", "dense"):
        cfg = tiny(products=way)
        batch, encode = objective.evaluation(clt, *pair, cfg, at(0.5)), objective.encoder(clt, cfg, at(0.5))
        for source in range(2):
            found = encode(source, pair[0][:, source])
            assert type(found) is type(batch.a[source])
            torch.testing.assert_close(found.dense(), batch.a[source].dense())


def test_balance_makes_both_pull_equally(clt, pair):
    cfg = end_to_end(kl=TermConfig(3.0, balance=True))
    found = objective.evaluate_batch(clt, *pair, cfg, at(0.5), Whole(share=0.8))
    fit, kl = (found.terms[name].item() for name in ("reconstruction", "kl"))
    assert found.loss.item() == pytest.approx((2 + 3) * fit)
    plain = objective.evaluate_batch(clt, *pair, end_to_end(), at(0.5), Whole(share=0.8)).loss
    only = Whole().terms(clt, objective.encoder(clt, cfg, at(0.5)), [], None)["kl"]
    expected = gradients(clt, plain + 3 * fit / kl * only)
    for one, other in zip(gradients(clt, found.loss), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_perfect_replacement_has_no_pull(clt, pair):
    with torch.no_grad():
        clt.W_dec[0].zero_()
    cfg = end_to_end(kl=TermConfig(3.0, balance=True))
    found = objective.evaluate_batch(clt, *pair, cfg, at(0.5), Whole())
    assert found.terms["kl"] == 0 and torch.isfinite(found.loss)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(clt, found.loss))


def test_the_share_weighs_all_other_terms(clt, pair):
    whole = objective.evaluate_batch(clt, *pair, tiny(), at(0.5))
    part = objective.evaluate_batch(clt, *pair, tiny(), at(0.5), Whole(share=0.75))
    torch.testing.assert_close(part.loss, 0.75 * whole.loss)
    for name, term in whole.terms.items():
        torch.testing.assert_close(part.terms[name], 0.75 * term)


def test_end_to_end_terms_without_sequences_are_refused(clt, pair):
    with pytest.raises(ShapeError, match="whole sequences for kl; found tokens without the sequences"):
        objective.evaluate_batch(clt, *pair, end_to_end(kl=TermConfig(1.0)), at(0.5))
