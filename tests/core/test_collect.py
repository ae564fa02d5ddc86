import torch

from circuitmill.core.collect import KINDS, BestWindows, Collector
from circuitmill.core.hashing import text_keys

N_FEATURES, WINDOW, CONTEXT = 5, 4, 12


def corpus(n_sequences: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse activations, window numbers and text keys; feature 3 is dead, feature 4 always fires."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = n_sequences * CONTEXT
    token_id = torch.randint(0, 6, (n_tokens,), generator=generator)
    # a feature's activation is a function of the last two tokens, so equal texts often have equal activations
    text = token_id * 6 + token_id.roll(1)
    table = torch.rand(36, N_FEATURES, generator=generator) * (torch.rand(36, N_FEATURES, generator=generator) < 0.15)
    table[:, 3] = 0
    table[:, 4] += 0.5
    starts = torch.arange(n_tokens) % CONTEXT == 0
    return table[text], torch.arange(n_tokens) // WINDOW, text_keys(token_id, starts, 3)


def collect(a: torch.Tensor, window: torch.Tensor, key: torch.Tensor, step: int) -> Collector:
    collector = Collector(N_FEATURES, top=6, quantile=4, silent=3, seed=7)
    for start in range(0, len(a), step * CONTEXT):
        part = slice(start, start + step * CONTEXT)
        collector.update(a[part], window[part], key[part])
    return collector


def peaks(a: torch.Tensor, window: torch.Tensor, key: torch.Tensor, feature: int) -> list[tuple[float, int, int]]:
    """(activation, window, key) of each window's first peak, by a plain loop."""
    found: dict[int, tuple[float, int]] = {}
    for index in range(len(a)):
        value, number = float(a[index, feature]), int(window[index])
        if value > 0 and value > found.get(number, (0.0, 0))[0]:
            found[number] = (value, int(key[index]))
    return [(value, number, text) for number, (value, text) in found.items()]


def test_statistics_equal_those_of_the_dense_activations() -> None:
    a, window, key = corpus(40)
    collector = collect(a, window, key, step=3)
    assert collector.n_tokens == len(a)
    assert torch.equal(collector.n_active, (a > 0).sum(0))
    torch.testing.assert_close(collector.total, a.double().sum(0))
    torch.testing.assert_close(collector.histogram.maximum, a.max(0).values)


def test_top_windows_are_the_best_of_each_text() -> None:
    a, window, key = corpus(60)
    collector = collect(a, window, key, step=7)
    collector.top.settle()
    for feature in range(N_FEATURES):
        best: dict[int, tuple[float, int]] = {}
        for value, number, text in sorted(peaks(a, window, key, feature), key=lambda peak: (-peak[0], peak[1])):
            best.setdefault(text, (value, number))
        expected = [number for _, number in sorted(best.values(), key=lambda item: (-item[0], item[1]))][:6]
        found = [number for number in collector.top.window[feature].tolist() if number >= 0]
        assert found == expected


def test_nothing_depends_on_the_batches() -> None:
    a, window, key = corpus(60)
    whole, parts = collect(a, window, key, step=60), collect(a, window, key, step=1)
    wanted = torch.ones(N_FEATURES, dtype=torch.bool)
    one, two = whole.chosen(wanted), parts.chosen(wanted)
    for name in ("feature", "kind", "rank", "window"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_each_kind_of_window_is_what_it_says() -> None:
    a, window, key = corpus(60)
    collector = collect(a, window, key, step=5)
    chosen = collector.chosen(collector.n_active > 0)
    largest = a.view(-1, WINDOW, N_FEATURES).amax(1)
    assert 3 not in chosen.feature
    for feature in (0, 1, 2, 4):
        mine = chosen.feature == feature
        kinds = {name: chosen.window[mine & (chosen.kind == kind)] for kind, name in enumerate(KINDS)}
        activations = {name: largest[numbers, feature] for name, numbers in kinds.items()}
        assert (activations["top"].diff() <= 0).all()
        assert (activations["quantile"].diff() >= 0).all() and (activations["quantile"] > 0).all()
        assert (activations["silent"] == 0).all()
        assert len(kinds["silent"]) == (0 if feature == 4 else 3)
        assert chosen.window[mine].unique().numel() == int(mine.sum()), "no window twice"


def test_quantile_windows_spread_over_activations() -> None:
    n_windows = 4000
    value = torch.linspace(0.01, 1.0, n_windows)[torch.randperm(n_windows, generator=torch.Generator().manual_seed(0))]
    collector = Collector(1, top=5, quantile=10, silent=0, seed=0)
    collector.update(value[:, None], torch.arange(n_windows), torch.arange(n_windows))
    chosen = collector.chosen(torch.tensor([True]))
    found = value[chosen.window[chosen.kind == 1]]
    quantile = chosen.quantile[chosen.kind == 1]
    assert quantile.unique().tolist() == [0, 25, 50, 75] and (quantile.diff() >= 0).all()
    assert (chosen.quantile[chosen.kind == 0] == -1).all()
    # ranks of 85 random values; an interval of ten even parts should meet each sample loosely
    assert (found - torch.linspace(0.05, 0.95, 10)).abs().max() < 0.15


def test_silent_windows_differ_between_features_and_are_even() -> None:
    n_windows, n_features = 2000, 50
    collector = Collector(n_features, top=1, quantile=0, silent=4, seed=0)
    collector.update(torch.zeros(n_windows, n_features), torch.arange(n_windows), torch.arange(n_windows))
    chosen = collector.chosen(torch.ones(n_features, dtype=torch.bool))
    assert len(chosen.window) == 4 * n_features
    assert chosen.window.unique().numel() > 100
    assert 800 < float(chosen.window.double().mean()) < 1200


def test_a_dropped_text_that_returns_stronger_enters() -> None:
    best = BestWindows(n_features=1, k=1)

    def offer(value: float, window: int, key: int) -> None:
        best.update(
            torch.tensor([0]),
            torch.tensor([value]).double(),
            torch.tensor([value]),
            torch.tensor([window]),
            torch.tensor([key]),
        )

    offer(1.0, 0, key=8)
    offer(2.0, 1, key=9)
    offer(3.0, 2, key=8)
    best.settle()
    assert (best.window.item(), best.key.item(), best.value.item()) == (2, 8, 3.0)
    offer(3.0, 1, key=9)
    best.settle()
    assert best.window.item() == 1, "equal scores go to the earlier window"


def test_an_empty_batch_changes_nothing() -> None:
    collector = Collector(2, top=2, quantile=2, silent=2, seed=0)
    none = torch.zeros(0, dtype=torch.int64)
    collector.update(torch.zeros(0, 2), none, none)
    assert collector.n_tokens == 0
    assert len(collector.chosen(torch.zeros(2, dtype=torch.bool)).window) == 0
