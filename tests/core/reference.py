"""Slow, obvious double-precision versions of transcoders, nonlinearities and losses.

Loops over tokens, sources, features, targets and dimensions; nothing is taken from the package but the parameters.
Functions that are not differentiable get the derivative of their docstrings' formula through `with_slope`.
"""

import itertools

import torch

ZERO = torch.zeros((), dtype=torch.float64)


def with_slope(value, *terms):
    """A number whose derivative is the sum of factor * derivative of quantity over (factor, quantity)."""
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    return value + sum((factor * (quantity - quantity.detach()) for factor, quantity in terms), ZERO)


def stacked(numbers):
    """Nested lists of numbers as a tensor."""
    if isinstance(numbers, list):
        return torch.stack([stacked(one) for one in numbers])
    return torch.as_tensor(numbers, dtype=torch.float64)


def joined(lists):
    """One list of all members."""
    return list(itertools.chain.from_iterable(lists))


# ---- who reads and who writes


def n_sources(coder):
    return 1 if coder.architecture.topology == "crosscoder" else coder.n_layers


def reads(coder, s):
    """Layers that a source reads."""
    return list(range(coder.n_layers)) if coder.architecture.topology == "crosscoder" else [s]


def targets(coder, s):
    """Layers that a source writes to."""
    kind = coder.architecture.topology
    if kind in ("acausal", "crosscoder"):
        return list(range(coder.n_layers))
    return [m for m in range(coder.n_layers) if (m >= s if kind == "clt" else m == s)]


def encoder_row(coder, s, layer):
    """Number of a (source, layer it reads) pair."""
    return [(s_, l_) for s_ in range(n_sources(coder)) for l_ in reads(coder, s_)].index((s, layer))


def pair(coder, s, m):
    """Number of a (source, target) pair."""
    return [(s_, m_) for s_ in range(n_sources(coder)) for m_ in targets(coder, s_)].index((s, m))


# ---- the transcoder


def pre_activations(coder, x):
    """One number at a time."""
    pre = []
    for t in range(len(x)):
        pre.append([])
        for s in range(n_sources(coder)):
            pre[t].append([])
            for i in range(coder.n_features):
                h = coder.b_enc[s, i]
                for layer in reads(coder, s):
                    for k in range(coder.d_model):
                        h = h + coder.W_enc[encoder_row(coder, s, layer), i, k] * x[t, layer, k]
                pre[t][s].append(h)
    return stacked(pre)


def encode(coder, x, **options):
    """Pre-activations, and activations by the thresholds."""
    pre = pre_activations(coder, x)
    return pre, jumprelu(pre, coder.log_threshold, **options)


def scale_and_offset(coder, s, m, i):
    """What the activation of a feature is multiplied with, and what is added to it, on the way to a target."""
    scale = getattr(coder.decoder, "pair_scale", None)
    offset = getattr(coder.decoder, "pair_offset", None)
    number = pair(coder, s, m)
    return (1.0 if scale is None else scale[number, i]), (0.0 if offset is None else offset[number, i])


def plain_vector(coder, s, m, i):
    """What a feature writes to a layer for an activation of 1, before factor and offset; a list of numbers."""
    form, parts = coder.architecture, coder.decoder
    if form.decoder == "target":
        return [parts.W_dec[m, i, k] for k in range(coder.d_model)]
    if form.decoder == "source":
        return [parts.W_dec[s, i, k] for k in range(coder.d_model)]
    if form.decoder == "low_rank":
        number = pair(coder, s, m)
        return [
            sum((parts.Q[s, i, r] * parts.P[number, r, k] for r in range(form.rank)), ZERO)
            for k in range(coder.d_model)
        ]
    index = targets(coder, s).index(m)
    if i < form.shared:
        return [parts.W_shared[i, index % (coder.n_layers // form.models), k] for k in range(coder.d_model)]
    return [parts.W_dec[s][i - form.shared, index, k] for k in range(coder.d_model)]


def vector(coder, s, m, i):
    """The same with the factor."""
    return [scale_and_offset(coder, s, m, i)[0] * number for number in plain_vector(coder, s, m, i)]


def transform_rows(coder, i):
    """Rows of U and V that belong to a transform; ranks r_0 > r_1 > ... have 1, 2, 4 ... shares of the transforms."""
    ranks = coder.architecture.ranks
    unit = coder.n_features // sum(2**g for g in range(len(ranks)))
    of_each = [rank for g, rank in enumerate(ranks) for _ in range(unit * 2**g)]
    first = sum(of_each[:i])
    return range(first, first + of_each[i])


def transform(coder, layer, i):
    """U_t V_t as a matrix: rows are what it writes, columns what it reads."""
    u, v = coder.decoder.U, coder.decoder.V
    return [
        [sum((u[layer, r, k] * v[layer, r, j] for r in transform_rows(coder, i)), ZERO) for j in range(coder.d_model)]
        for k in range(coder.d_model)
    ]


def written(coder, s, m, i, a, x):
    """What one feature with activation a writes to a layer; a list of numbers. x: what token's source read."""
    if coder.architecture.topology == "molt":
        matrix = transform(coder, s, i)
        return [a * sum((row[j] * x[j] for j in range(coder.d_model)), ZERO) for row in matrix]
    scale, offset = scale_and_offset(coder, s, m, i)
    adjusted = scale * a + (offset if a > 0 else 0.0)
    return [adjusted * number for number in plain_vector(coder, s, m, i)]


def decode(coder, a, x=None, first=None, bias=True):
    """Each layer adds up what every feature that writes to it writes, its bias and its skip connection.

    first: so many features of each source take part (a Matryoshka prefix).
    """
    n_features = coder.n_features if first is None else first
    y = []
    for t in range(len(a)):
        y.append([])
        for m in range(coder.n_layers):
            total = [coder.b_dec[m, k] if bias else ZERO for k in range(coder.d_model)]
            for s in range(n_sources(coder)):
                if m not in targets(coder, s):
                    continue
                for i in range(n_features):
                    parts = written(coder, s, m, i, a[t, s, i], None if x is None else x[t, s])
                    total = [one + part for one, part in zip(total, parts, strict=True)]
            if bias and coder.W_skip is not None:
                assert x is not None
                for k in range(coder.d_model):
                    for j in range(coder.d_model):
                        total[k] = total[k] + coder.W_skip[m, k, j] * x[t, m, j]
            y[t].append(total)
    return stacked(y)


def length(numbers):
    """Root of a sum of squares, whose derivative at zero is zero."""
    square = sum((number * number for number in numbers), ZERO)
    return square.sqrt() if square > 0 else 0.0 * square


def norm(coder, s, i, kind="concatenated"):
    """Length of all decoder vectors of a feature put one after the other, or their lengths added up."""
    if coder.architecture.topology == "molt":
        return length([number for row in transform(coder, s, i) for number in row])
    vectors = [vector(coder, s, m, i) for m in targets(coder, s)]
    if kind == "summed":
        return sum((length(one) for one in vectors), ZERO)
    return length([number for one in vectors for number in one])


def norms(coder, kind="concatenated"):
    """Of all features, [source feature]."""
    return stacked(
        [[norm(coder, s, i, kind) for i in range(coder.n_features)] for s in range(n_sources(coder))],
    )


# ---- nonlinearities: [token source feature] to the same


def near(h, theta, bandwidth):
    return abs(h.item() - theta.item()) / bandwidth < 0.5


def jumprelu(pre, log_threshold, bandwidth=1.0, derivative="chain", pass_through=False):
    """da/dh = H (+ theta/bandwidth rect), da/dt = -(theta/bandwidth) rect, times theta by the chain rule."""
    a = []
    for t in range(pre.shape[0]):
        a.append([])
        for s in range(pre.shape[1]):
            a[t].append([])
            for i in range(pre.shape[2]):
                h, log, theta = pre[t, s, i], log_threshold[s, i], log_threshold[s, i].exp().detach()
                fires, close = bool(h > theta), near(h, theta, bandwidth)
                slope = float(fires) + (theta / bandwidth if pass_through and close else 0.0)
                by_log = -(theta / bandwidth) * (theta if derivative == "chain" else 1.0) if close else 0.0
                a[t][s].append(with_slope(h if fires else 0.0, (slope, h), (by_log, log)))
    return stacked(a)


def step(h, log, bandwidth, derivative):
    """dH/dt = -(1/bandwidth) rect, times theta by the chain rule; none by h."""
    theta = log.exp().detach()
    by_log = -(theta if derivative == "chain" else 1.0) / bandwidth if near(h, theta, bandwidth) else 0.0
    return with_slope(float(h > theta), (by_log, log))


def keep_largest(pre, rows, k):
    """Of each list of places (t, s, i) the k largest positive numbers, of equal ones the earlier; zero elsewhere."""
    kept = set()
    for places in rows:
        # sorted is stable: of equal numbers the earlier place comes first
        kept |= set(sorted(places, key=lambda place: -pre[place].item())[:k])
    return stacked(
        [
            [
                [
                    pre[t, s, i] if (t, s, i) in kept and pre[t, s, i] > 0 else 0.0 * pre[t, s, i].detach()
                    for i in range(pre.shape[2])
                ]
                for s in range(pre.shape[1])
            ]
            for t in range(pre.shape[0])
        ]
    )


def activations(name, pre, log_threshold=None, k=0.0, **options):
    """The nonlinearity of this name."""
    n, sources, features = pre.shape
    places = [[[(t, s, i) for i in range(features)] for s in range(sources)] for t in range(n)]
    if name == "jumprelu":
        return jumprelu(pre, log_threshold, **options)
    if name == "relu":
        return keep_largest(pre, [places[t][s] for t in range(n) for s in range(sources)], features)
    if name == "topk":
        return keep_largest(pre, [places[t][s] for t in range(n) for s in range(sources)], round(k))
    if name == "token_topk":
        return keep_largest(pre, [joined(places[t]) for t in range(n)], round(k * sources))
    if name == "batch_topk":
        return keep_largest(pre, [joined(places[t][s] for t in range(n)) for s in range(sources)], round(k * n))
    if name == "batch_topk_all":
        return keep_largest(pre, [joined(joined(places))], round(k * n * sources))
    assert name == "groupmax"
    size = features // round(k)
    groups = [
        places[t][s][low : low + size] for t in range(n) for s in range(sources) for low in range(0, features, size)
    ]
    return keep_largest(pre, groups, 1)


# ---- terms of the loss: mean over tokens of a sum over everything else


def reconstruction(y, y_hat):
    """Mean over tokens of the squared error summed over layers and dimensions."""
    total = ZERO
    for t in range(len(y)):
        for m in range(y.shape[1]):
            for k in range(y.shape[2]):
                total = total + (y[t, m, k] - y_hat[t, m, k]) ** 2
    return total / len(y)


def over_features(a, function):
    """Mean over tokens of the sum of function(t, s, i)."""
    total = ZERO
    for t in range(a.shape[0]):
        for s in range(a.shape[1]):
            for i in range(a.shape[2]):
                total = total + function(t, s, i)
    return total / a.shape[0]


def weight(coder, s, i, kind="concatenated", features="all"):
    """The norm of a feature that a term is about, else zero."""
    left_out = {"all": False, "shared": i >= coder.architecture.shared, "exclusive": i < coder.architecture.shared}
    return ZERO if left_out[features] else norm(coder, s, i, kind)


def tanh_sparsity(coder, a, scale, kind="concatenated", features="all"):
    """Mean over tokens of the sum of tanh(scale norm a)."""
    return over_features(a, lambda t, s, i: torch.tanh(scale * weight(coder, s, i, kind, features) * a[t, s, i]))


def l1(coder, a, kind="concatenated", features="all"):
    """Mean over tokens of the sum of norm a."""
    return over_features(a, lambda t, s, i: weight(coder, s, i, kind, features) * a[t, s, i])


def pre_activation(coder, pre, kind="concatenated"):
    """Mean over tokens of the sum of relu(threshold - h) norm, without gradient to the norms."""

    def one(t, s, i):
        gap = coder.log_threshold[s, i].exp() - pre[t, s, i]
        return gap * norm(coder, s, i, kind).detach() if gap > 0 else ZERO

    return over_features(pre, one)


def quadratic_l0(coder, pre, target, bandwidth=1.0, derivative="chain"):
    """Mean over tokens of the sum over sources of (L0 / target - 1)^2."""
    total = ZERO
    for t in range(pre.shape[0]):
        for s in range(pre.shape[1]):
            l0 = ZERO
            for i in range(pre.shape[2]):
                l0 = l0 + step(pre[t, s, i], coder.log_threshold[s, i], bandwidth, derivative)
            total = total + (l0 / target - 1) ** 2
    return total / pre.shape[0]


def frequency(coder, pre, density, scale, bandwidth=1.0, derivative="chain"):
    """Mean over tokens of the sum of density / scale over features that fire."""
    return over_features(
        pre,
        lambda t, s, i: density[s, i] / scale * step(pre[t, s, i], coder.log_threshold[s, i], bandwidth, derivative),
    )


def auxiliary(coder, x, y, pre, a, dead, k):
    """min(1, dead / (k sources)) ||e - what the k strongest dead features of each token and source write||^2."""
    if not dead.any():
        return ZERO
    candidates = [
        [(t, s, i) for i in range(pre.shape[2]) if dead[s, i]] for t in range(pre.shape[0]) for s in range(pre.shape[1])
    ]
    strongest = keep_largest(pre, candidates, k)
    error = (y - decode(coder, a, x)).detach()
    return min(1.0, dead.sum().item() / (k * n_sources(coder))) * reconstruction(
        error, decode(coder, strongest, x, bias=False)
    )


def jumprelu_gradients(pre, log_threshold, upstream, bandwidth, derivative, pass_through=False):
    """The stated straight-through formula for one layer, written out: gradients by pre-activation and log-threshold."""
    by_pre = torch.zeros_like(pre)
    by_log = torch.zeros_like(log_threshold)
    for i in range(pre.shape[1]):
        theta = log_threshold[i].exp()
        for t in range(pre.shape[0]):
            if pre[t, i] > theta:
                by_pre[t, i] += upstream[t, i]
            if abs(pre[t, i] - theta) / bandwidth < 0.5:
                by_log[i] += upstream[t, i] * -(theta / bandwidth) * (theta if derivative == "chain" else 1.0)
                if pass_through:
                    by_pre[t, i] += upstream[t, i] * theta / bandwidth
    return by_pre, by_log
