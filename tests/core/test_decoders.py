import pytest
import torch
from tests.core import reference
from tests.core.coders import ROWS, same_with_gradients, small, tokens_for

from circuitmill.core.decoders import ALL, Untied
from circuitmill.core.mixture import Mixture
from circuitmill.core.operand import Dense
from circuitmill.core.parts import spans_of
from circuitmill.errors import ShapeError
from circuitmill.kernels.entries import places
from circuitmill.kernels.sparse import Sparse

WITHOUT_VECTORS = {
    "molt": "features that write a vector; found transforms",
    "molt skip": "features that write a vector; found transforms",
    "target pairs": "decoders without offsets; found pair_offset",
    "source offset": "decoders without offsets; found pair_offset",
    "source pairs": "decoders without offsets; found pair_offset",
}


def activations(coder, n_tokens=4):
    """Random ones of all sources, about half of them zero, and what they are the positive part of."""
    torch.manual_seed(5)
    drive = torch.randn(n_tokens, coder.n_sources, coder.n_features, dtype=torch.float64, requires_grad=True)
    return drive, drive.relu()


def operand(a, kind):
    if kind == "dense":
        return Dense(a)
    # some places with a zero are kept too, as those near the threshold are
    entries = places((a.detach() > 0) | (torch.rand_like(a.detach()) < 0.2))
    return Sparse(entries, entries.gather(a))


def written_in_loops(coder, source, a, x, features):
    return reference.stacked(
        [
            [
                [
                    sum(
                        (
                            reference.written(coder, source, target, i, a[t, source, i], x[t, source])[k]
                            for i in features
                        ),
                        reference.ZERO,
                    )
                    for k in range(coder.d_model)
                ]
                for target in reference.targets(coder, source)
            ]
            for t in range(len(a))
        ]
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("span", [ALL, slice(0, 2), slice(1, 5)], ids=str)
def test_what_a_source_writes_equals_the_loop(row, span):
    coder = small(row, n_features=6, d_model=2)
    x, (drive, a) = tokens_for(coder, 3), activations(coder, 3)
    for source in range(coder.n_sources):
        theirs = written_in_loops(coder, source, a, x, range(6)[span])
        for kind in ("dense", "sparse"):
            ours = coder.decoder.written(source, operand(a[:, source], kind).within(span), x[:, source], span)
            same_with_gradients(ours, theirs, coder, others=[drive])


@pytest.mark.parametrize("row", [row for row in ROWS if row not in WITHOUT_VECTORS])
def test_decoder_vectors_equal_the_loop(row):
    coder = small(row, n_features=6)
    for source in range(coder.n_sources):
        theirs = reference.stacked(
            [[reference.vector(coder, source, m, i) for m in reference.targets(coder, source)] for i in range(6)]
        )
        same_with_gradients(coder.decoder_block(source), theirs, coder)
        same_with_gradients(coder.decoder_block(source, slice(1, 4)), theirs[1:4], coder)


@pytest.mark.parametrize("row", WITHOUT_VECTORS)
def test_forms_without_vectors_say_why(row):
    with pytest.raises(ShapeError, match=WITHOUT_VECTORS[row]):
        small(row).decoder_block(0)


def silence(coder, what):
    """Make decoders zero: all parameters, all vectors, one of two halves whose product they are, or one feature."""
    for name, parameter in coder.decoder.named_parameters():
        own = name.split(".")[0]
        if what == "one feature":
            if own == "U":
                parameter[:, reference.transform_rows(coder, 0)] = 0
            elif own in ("W_dec", "Q"):
                # by source or target first, except where every source has a tensor of its own
                (parameter[0] if name != own else parameter[:, 0]).zero_()
            elif own == "W_shared":
                parameter[0] = 0
        elif what == "all" or own in {"vectors": ("W_dec", "W_shared", "Q", "P", "U", "V"), "half": ("P", "U")}[what]:
            parameter.zero_()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("what", ["all", "vectors", "half", "one feature"])
def test_norms_of_zero_decoders_have_gradient_zero(row, what):
    coder = small(row)
    with torch.no_grad():
        silence(coder, what)
    for kind in ("concatenated", "summed"):
        norms = coder.decoder_norms(kind)
        same_with_gradients(norms, reference.norms(coder, kind), coder)
        gradients = torch.autograd.grad(
            norms.sum(), list(coder.decoder.parameters()), allow_unused=True, materialize_grads=True
        )
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert not norms[:, 0].any() or what == "half"
        if what in ("all", "vectors"):
            assert not norms.any() and not any(gradient.any() for gradient in gradients)


def test_norm_of_a_transform_is_frobenius():
    coder = small("molt", n_features=6, d_model=4)
    assert isinstance(coder.decoder, Mixture)
    u, v = coder.decoder.U, coder.decoder.V
    matrices = [
        u[1, :2].T @ v[1, :2],
        u[1, 2:4].T @ v[1, 2:4],
        *(u[1, row, :, None] @ v[1, row, None] for row in range(4, 8)),
    ]
    assert coder.decoder.groups == ((2, 2), (4, 1))
    expected = torch.stack([torch.linalg.matrix_norm(matrix) for matrix in matrices])
    torch.testing.assert_close(coder.decoder_norms()[1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(coder.decoder_norms("summed")[1], expected, rtol=0, atol=1e-12)


def test_a_transform_needs_what_it_is_applied_to():
    with pytest.raises(ShapeError, match=r"what the transforms are applied to; found activations alone"):
        small("molt").decode_layer(0, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("by_dimension", [False, True])
def test_divided_outputs_are_outputs_divided(row, by_dimension):
    coder = small(row)
    x = tokens_for(coder)
    a = coder.encode(x)
    factor = torch.rand(coder.n_layers, coder.d_model, dtype=torch.float64) + 0.5
    if not by_dimension:
        factor = factor[:, :1].expand_as(factor).contiguous()
    before = [coder.decode_layer(source, a[:, source], x[:, source]).detach() for source in range(coder.n_sources)]
    if by_dimension and row.startswith("source"):
        with pytest.raises(ShapeError, match=r"one factor per layer .*found one per dimension\n .*\n .*scaling rms"):
            coder.decoder.divide_outputs(factor)
        return
    coder.decoder = coder.decoder.divide_outputs(factor)
    for source, old in enumerate(before):
        new = coder.decode_layer(source, a[:, source], x[:, source])
        torch.testing.assert_close(new, old / factor[list(coder.topology.writes[source])], rtol=0, atol=1e-10)


def test_only_decoders_shared_by_models_change_their_form():
    for row in ROWS:
        coder = small(row)
        changed = coder.decoder.divide_outputs(torch.full((coder.n_layers, coder.d_model), 2.0))
        if row == "crosscoder shared":
            assert type(changed) is Untied and changed.W_dec[0].dtype == torch.float64
        else:
            assert changed is coder.decoder


def test_shared_features_write_the_same_for_every_model():
    coder = small("crosscoder shared", n_features=4)
    block = coder.decoder_block(0)
    assert torch.equal(block[0, :2], block[0, 2:])
    assert not torch.equal(block[1, :2], block[1, 2:])


def test_stretches_between_prefixes():
    assert spans_of((1, 3, 4), 4) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert spans_of((), 4) == [slice(0, 4)]


@pytest.mark.parametrize("row", ROWS)
def test_parameters_taken_apart_give_the_same(row):
    coder = small(row)
    x = tokens_for(coder)
    a = coder.encode(x)
    molt = coder.architecture.topology == "molt"

    def value():
        written = sum(coder.decode_layer(s, a[:, s], x[:, s]).square().sum() for s in range(coder.n_sources))
        return written + coder.decoder_norms().sum() + coder.decoder_norms("summed").square().sum()

    parameters = list(coder.decoder.parameters())
    outside = value()
    expected = torch.autograd.grad(outside, parameters, retain_graph=True)
    with coder.decoder.opened():
        inside = value()
    torch.testing.assert_close(inside, outside)
    for one, other in zip(torch.autograd.grad(inside, parameters, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert molt or not any("Slice" in name or "Select" in name for name in functions(inside, coder.decoder))


def functions(value: torch.Tensor, decoder: torch.nn.Module) -> set[str]:
    """Names of the operations whose gradients go on to parameters of the decoder."""
    own, found, waiting, seen = {id(p) for p in decoder.parameters()}, set(), [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            if child is not None and id(getattr(child, "variable", None)) in own:
                found.add(node.name())
            waiting.append(child)
    return found
