import pytest
import torch
from tests.training.helpers import Memory, batches, fresh, run, tiny
from tests.training.kinds import check_resuming, held_out_ev, kind

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.core.rounding import generator_at, round_stochastically
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.training import precision, state
from circuitmill.training.objective import Moment, evaluate_batch, evaluation

IN_BF16 = ("adam", "adamw", "adam8bit", "muon")


def rounded(values: torch.Tensor, draws: int) -> torch.Tensor:
    generator = generator_at("0", 0, values.device)
    return torch.stack([round_stochastically(values, generator) for _ in range(draws)])


def test_rounding_is_unbiased_and_to_a_neighbour():
    values = torch.tensor([1.001, -1.001, 3.14159, -2e-5, 1e30, 7.7e-39, 0.1, 255.9])
    found = rounded(values, 20_000).double()
    exact = values.double()
    for column, value in zip(found.T, exact, strict=True):
        low, high = column.unique().tolist()
        assert low < value < high
        # neighbours: nothing in bfloat16 lies between them
        between = torch.tensor((low + high) / 2, dtype=torch.float64).to(torch.bfloat16).double()
        assert between.item() in (low, high)
        share = (value - low) / (high - low)
        deviation = (share * (1 - share) / len(column)) ** 0.5
        assert abs((column == high).double().mean() - share) < 5 * deviation
        assert abs(column.mean() - value) < 5 * deviation * (high - low)


def test_what_bfloat16_holds_is_left_alone():
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(rounded(exact.float(), 1)[0], exact)
    assert torch.equal(rounded(torch.tensor([0.0, -0.0, 1.0]), 1)[0], torch.tensor([0.0, -0.0, 1.0]).bfloat16())


def test_random_numbers_follow_seed_and_step():
    def draw(seed: int, step: int) -> list[int]:
        return torch.randint(0, 1 << 16, (4,), generator=generator_at(str(seed), step, torch.device("cpu"))).tolist()

    assert draw(3, 5) == draw(3, 5)
    assert len({tuple(draw(seed, step)) for seed in range(5) for step in range(20)}) == 100


def test_steps_far_below_the_spacing_of_numbers_add_up():
    """Rounded to the nearest, no number would ever move: the step is a hundredth of the spacing at 1."""
    cfg = tiny(optimizer__precision="bf16", n_features=2048, init__encoder_bias="zero")
    trained = fresh(cfg)
    W_enc = trained.transcoder.W_enc
    assert W_enc.dtype == torch.bfloat16
    with torch.no_grad():
        W_enc.fill_(1.0)
    spacing = 2.0**-8  # below 1
    for number in range(50):
        W_enc.grad = torch.ones_like(W_enc)
        trained.optimizer.step(spacing / 100, norm=1.0, number=number)
    moved = 1 - W_enc.double()
    assert moved.mean().item() == pytest.approx(spacing / 2, rel=0.05)
    assert len(moved.unique()) > 1


@pytest.mark.parametrize("name", IN_BF16)
def test_matrices_are_stored_in_bfloat16_and_moments_are_not(name):
    saved = []
    cfg = kind(name, optimizer__precision="bf16")
    finished, _ = run(cfg, checkpoint=lambda state, l0=None: saved.append(state.tensors()))
    for key, tensor in saved[-1].items():
        if key.startswith("parameter."):
            assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 3 else torch.float32), key
        elif key.startswith("optimizer/"):
            assert tensor.dtype in (torch.float32, torch.uint8), key
    for parameter, own in finished.optimizer.names.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, saved[-1][f"parameter.{own}"].float())
    assert saved[-1]["density"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "bits"), [("adam", "bf16_autocast"), ("muon", "bf16_autocast"), ("schedule_free", "bf16_autocast")]
    + [(name, "bf16") for name in IN_BF16],
)  # fmt: skip
def test_it_learns_the_task_about_as_well(name, bits):
    cfg = kind(name, tokens=6400, optimizer__precision=bits)
    trained, rows = run(cfg)
    assert 0.92 < held_out_ev(cfg, trained) < 0.999
    assert 0.92 < rows[-1]["ev"] < 0.999


@pytest.mark.parametrize("name", ["adam", "adam8bit", "muon"])
def test_resuming_in_bfloat16_gives_the_same_bits(name):
    check_resuming(kind(name, optimizer__precision="bf16"), (1, 13))


def test_resuming_with_autocast_gives_the_same_bits():
    check_resuming(kind("schedule_free", optimizer__precision="bf16_autocast"), (7,))


@pytest.mark.parametrize("bits", ["bf16_autocast", "bf16"])
@pytest.mark.parametrize("l0", [4.0, 0.5], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "architecture",
    [
        ArchitectureConfig(),
        ArchitectureConfig(decoder="low_rank", rank=3),
        ArchitectureConfig(topology="molt", ranks=(4, 2)),
        ArchitectureConfig(topology="crosscoder"),
        ArchitectureConfig(decoder="source", pair_offset=True, skip=True),
        ArchitectureConfig(prefixes=(16, 48)),
    ],
    ids=["clt", "low_rank", "molt", "crosscoder", "source", "matryoshka"],
)
def test_only_factors_have_fewer_bits(architecture, bits, l0):
    """Dead features take part, and places few enough for the sparse way."""
    cfg = tiny(architecture=architecture, n_features=48, init__l0=l0, optimizer__precision=bits, batch_tokens=64)
    trained, exact = fresh(cfg), fresh(tiny(architecture=architecture, n_features=48, init__l0=l0, batch_tokens=64))
    with batches(cfg) as data:
        pair = data.get(1)
    dead = torch.zeros_like(trained.idle, dtype=torch.bool)
    dead[:, ::3] = True
    moment = Moment(320, dead, trained.density)
    with precision.products(bits, torch.device("cpu")):
        found = evaluation(trained.transcoder, *pair, cfg, moment)
        result = evaluate_batch(trained.transcoder, *pair, cfg, moment)
        pre = found.pre
    assert {part.dtype for part in (*pre, *found.y_hats, result.loss, *result.terms.values())} == {torch.float32}
    assert {a.dense().dtype for a in found.a} == {torch.float32}
    expected = evaluate_batch(exact.transcoder, *pair, cfg, moment)
    for name, term in result.terms.items():
        torch.testing.assert_close(term, expected.terms[name], rtol=0.05, atol=1e-3)
    assert not torch.equal(result.loss, expected.loss)
    result.loss.backward()
    expected.loss.backward()
    for parameter, name in trained.optimizer.names.items():
        reference = exact.transcoder.get_parameter(name).grad
        assert parameter.grad is not None and reference is not None
        assert parameter.grad.dtype == parameter.dtype
        assert (parameter.grad - reference).norm() <= 0.1 * reference.norm() + 1e-3, name


def test_float16_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"train\.optimizer\.precision"):
        fresh(tiny(optimizer__precision="fp16"))


def test_averages_cannot_be_held_in_bfloat16():
    with pytest.raises(ConfigError, match=r"train\.optimizer\.precision"):
        fresh(kind("schedule_free", optimizer__precision="bf16"))


@pytest.fixture
def float16_on_a_cpu(monkeypatch):
    """Slow there and refused for that, but the arithmetic is the same."""
    monkeypatch.setattr(state.precision, "store_matrices", lambda transcoder, cfg: None)


@pytest.mark.parametrize("name", ["adam", "muon", "schedule_free"])
def test_float16_learns_the_task_about_as_well(name, float16_on_a_cpu):
    cfg = kind(name, tokens=6400, optimizer__precision="fp16")
    trained, rows = run(cfg)
    assert 0.92 < held_out_ev(cfg, trained) < 0.999
    assert 2.0**12 <= rows[-1]["loss_scale"] <= 2.0**16


class Overflowing(Memory):
    """Gradients of some steps are too large for a scaled loss, though the loss is finite."""

    def pair(self, index):
        x, y = super().pair(index)
        return (x, y * 1e16) if index in (3, 4, 9) else (x, y)


def test_float16_leaves_out_updates_whose_scaled_gradient_overflows(float16_on_a_cpu):
    cfg = tiny(optimizer__precision="fp16", monitor__log_tokens=32)
    states = []
    trained, rows = run(
        cfg,
        source=Overflowing(),
        stop=lambda: False,
        checkpoint=lambda state, l0=None: states.append((state.step, state.transcoder.W_enc.clone())),
    )
    scales = [row["loss_scale"] for row in rows]
    assert scales[:3] == [2.0**16] * 3 and scales[3:9] == [2.0**15, *[2.0**14] * 5] and scales[-1] == 2.0**13
    assert [not torch.isfinite(torch.tensor(row["grad_norm"])) for row in rows].count(True) == 3
    assert all(torch.isfinite(parameter).all() for parameter in trained.transcoder.parameters())
    counted = trained.tensors()["optimizer/step/W_enc"]
    assert counted == cfg.steps - 3


def test_resuming_float16_gives_the_same_bits(float16_on_a_cpu):
    check_resuming(tiny(optimizer__precision="fp16"), (4, 8), source=Overflowing())


def test_float16_gives_up_when_no_scale_helps():
    scale = precision.LossScale(torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([parameter])

    def attempt(gradient: float, number: int) -> bool:
        scale.scaled(parameter.sum())
        parameter.grad = torch.full((3,), gradient)
        scale.unscale([inner])
        return scale.accepts(parameter.grad.norm().item(), number)

    assert attempt(2.0**16, 0)
    torch.testing.assert_close(parameter.grad, torch.ones(3))
    for number in range(precision.SKIPPED - 1):
        assert not attempt(torch.inf, number)
    assert attempt(1.0, 30)
    assert scale.scale == 2.0 ** (16 - precision.SKIPPED + 1)
    with pytest.raises(DivergedError, match="20 steps"):
        for number in range(precision.SKIPPED):
            attempt(torch.nan, number)


class Poisoned(Memory):
    def pair(self, index):
        x, y = super().pair(index)
        return x, y * float("nan") if index == 5 else y


@pytest.mark.parametrize("bits", ["bf16_autocast", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_stops_before_the_update(bits, float16_on_a_cpu):
    cfg = tiny(checkpoint_tokens=32, optimizer__precision=bits)
    trained, saved = fresh(cfg), []
    with pytest.raises(DivergedError, match=r"a finite reconstruction term of the loss; found nan at step 5"):
        run(cfg, trained, source=Poisoned(), checkpoint=lambda state, l0=None: saved.append(state.tensors()))
    assert trained.step == 5
    assert torch.equal(saved[-1]["parameter.W_enc"], trained.transcoder.W_enc)
