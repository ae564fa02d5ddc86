import pytest
import torch
from tests.core.coders import ROWS, random_transcoder, tokens_for

from circuitmill.config.train import TOP_K
from circuitmill.core.conversion import ThresholdCalibration, feature_thresholds, set_thresholds
from circuitmill.core.nonlinearity import NONLINEARITIES, Settings
from circuitmill.errors import DivergedError, ShapeError

K = 3.0


@pytest.fixture(params=["clt", "crosscoder"])
def coder(request):
    return random_transcoder(3, 12, 4, architecture=ROWS[request.param])


def pre_of(coder, x):
    return coder.pre_activations(x).detach()


def kept_of(coder, pre, name):
    """Pre-activations and numbers of kept places, by source."""
    a = NONLINEARITIES[name](pre, coder.log_threshold, Settings(k=K))
    return list(pre.unbind(dim=1)), (a > 0).sum(dim=(0, 2)).tolist()


def calibrated(coder, batches, name, most=None):
    found = ThresholdCalibration(coder.n_sources, most)
    for pre in batches:
        found.update(*kept_of(coder, pre, name))
    return found


def firings(coder, x):
    return (coder.encode(x) > 0).sum(dim=(0, 2)).tolist()


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most", [None, 10_000])
def test_exactly_as_many_features_fire_as_are_kept(coder, name, dtype, most):
    coder = coder.to(dtype)
    x = tokens_for(coder, 60).to(dtype)
    found = calibrated(coder, [pre_of(coder, x)], name, most)
    _, wanted = kept_of(coder, pre_of(coder, x), name)
    set_thresholds(coder, found.thresholds())
    assert firings(coder, x) == wanted
    assert found.l0().tolist() == pytest.approx([number / 60 for number in wanted])
    assert torch.equal(coder.log_threshold, coder.log_threshold[:, :1].expand_as(coder.log_threshold))


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("size", [7, 20, 30])
def test_batches_give_what_one_batch_of_the_same_kept_places_gives(coder, name, size):
    x = tokens_for(coder, 60)
    pre = pre_of(coder, x)
    batches = pre.split(size)
    streamed = calibrated(coder, batches, name)
    counts = [sum(column) for column in zip(*(kept_of(coder, one, name)[1] for one in batches), strict=True)]
    whole = ThresholdCalibration(coder.n_sources)
    whole.update(list(pre.unbind(dim=1)), counts)
    assert torch.equal(streamed.thresholds(), whole.thresholds())
    assert torch.equal(streamed.l0(), whole.l0()) and streamed.n_tokens == 60
    set_thresholds(coder, streamed.thresholds())
    assert firings(coder, x) == counts
    if name in ("topk", "token_topk", "groupmax"):  # what they keep does not depend on the other tokens
        assert torch.equal(calibrated(coder, [pre], name).thresholds(), streamed.thresholds())


@pytest.mark.parametrize("most", [None, 6, 7])
def test_a_later_batch_may_keep_more_than_it_has_large_values_for(most):
    # the six largest of both batches are in the first, of which only one was kept
    first, second = torch.arange(1.0, 11.0)[:, None] + 100, torch.arange(1.0, 6.0)[:, None]
    found = ThresholdCalibration(1, most)
    found.update([first], [1])
    found.update([second], [5])
    threshold = found.thresholds().item()
    assert threshold == 104.5
    assert (torch.cat([first, second]) > threshold).sum() == 6


@pytest.mark.parametrize("most", [40, 60])
def test_an_upper_bound_changes_memory_and_nothing_else(most):
    torch.manual_seed(0)
    free, bound = ThresholdCalibration(2), ThresholdCalibration(2, most)
    for step in range(20):
        pre = [torch.randn(6, 50, generator=torch.Generator().manual_seed(step)) for _ in range(2)]
        for one in (free, bound):
            one.update(pre, [2, 1])
        assert all(sum(map(len, parts)) <= 2 * (most + 1) for parts in bound._positive)
    assert torch.equal(free.thresholds(), bound.thresholds())
    assert sum(map(len, free._positive[0])) > 2000


def test_more_kept_than_the_upper_bound_is_an_error():
    found = ThresholdCalibration(1, 4)
    with pytest.raises(ShapeError, match=r"at most 4 places kept of a source; found 5\n  where: source 0"):
        found.update([torch.rand(3, 4)], [5])


def test_equal_values_fire_together_or_not_at_all():
    found = ThresholdCalibration(1)
    found.update([torch.tensor([[3.0, 2.0, 2.0, 1.0]])], [2])
    assert found.thresholds().item() == 2.0


def test_all_that_is_positive_may_fire():
    found = ThresholdCalibration(1)
    found.update([torch.tensor([[3.0, 1.0, -1.0]])], [2])
    assert found.thresholds().item() == 0.5


@pytest.mark.parametrize(
    ("pre", "kept", "message"),
    [
        (torch.ones(2, 3), [0], "0 places kept"),
        (-torch.ones(2, 3), [1], "1 places kept, 0 above zero"),
        (None, None, "0 places kept"),
    ],
)
def test_a_source_on_which_nothing_fires_is_named(pre, kept, message):
    found = ThresholdCalibration(2)
    if pre is not None:
        found.update([torch.ones(2, 3), pre], [2, *kept])
    source = 0 if pre is None else 1
    with pytest.raises(
        DivergedError, match=rf"found {message}\n  where: source {source} of the transcoder\n .*nonlinearity.k"
    ):
        found.thresholds()


def test_every_source_has_an_entry():
    with pytest.raises(ShapeError, match=r"2 sources; found pre-activations of 1, kept places of 2"):
        ThresholdCalibration(2).update([torch.ones(2, 3)], [1, 1])


@pytest.mark.parametrize("name", ["topk", "token_topk", "groupmax"])
@pytest.mark.parametrize("block", [5, 1024])
def test_each_feature_fires_as_often_as_it_is_kept(coder, name, block):
    x = tokens_for(coder, 40)
    kept = NONLINEARITIES[name](pre_of(coder, x), coder.log_threshold, Settings(k=K)) > 0
    wanted = kept.sum(dim=0)
    set_thresholds(coder, feature_thresholds(coder, x, wanted, block=block))
    assert torch.equal((coder.encode(x) > 0).sum(dim=0), wanted)
    assert (coder.threshold > 0).all()


def test_a_feature_that_is_never_kept_does_not_fire(coder):
    x = tokens_for(coder, 40)
    wanted = (pre_of(coder, x) > 0).sum(dim=0)
    wanted[:, ::3] = 0
    set_thresholds(coder, feature_thresholds(coder, x, wanted))
    assert torch.equal((coder.encode(x) > 0).sum(dim=0), wanted)
