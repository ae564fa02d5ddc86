"""Slow, obvious double-precision versions of the transcoder and its losses: loops over tokens, layers and features."""

import math

import torch


def encode(clt, x):
    """Pre-activations and activations, one number at a time."""
    n_tokens = x.shape[0]
    pre = torch.zeros(n_tokens, clt.n_layers, clt.n_features, dtype=torch.float64)
    for t in range(n_tokens):
        for s in range(clt.n_layers):
            for i in range(clt.n_features):
                pre[t, s, i] = clt.b_enc[s, i] + sum(clt.W_enc[s, i, k] * x[t, s, k] for k in range(clt.d_model))
    return pre, torch.where(pre > clt.log_threshold.exp(), pre, torch.zeros_like(pre))


def decode(clt, a):
    """Each layer adds up what every feature at or below it writes."""
    y = torch.zeros(a.shape[0], clt.n_layers, clt.d_model, dtype=torch.float64)
    for t in range(a.shape[0]):
        for m in range(clt.n_layers):
            y[t, m] = clt.b_dec[m]
            for s in range(m + 1):
                for i in range(clt.n_features):
                    y[t, m] = y[t, m] + a[t, s, i] * clt.W_dec[s][i, m - s]
    return y


def norm(clt, s, i):
    """Length of all decoder vectors of a feature put one after the other."""
    return sum((clt.W_dec[s][i, k] ** 2).sum() for k in range(clt.n_layers - s)).sqrt()


def reconstruction(y, y_hat):
    """Mean over tokens of the squared error summed over layers and dimensions."""
    return sum(((y[t] - y_hat[t]) ** 2).sum() for t in range(len(y))) / len(y)


def tanh_sparsity(clt, a, scale):
    """Mean over tokens of the sum of tanh(scale norm a)."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(a.shape[0]):
        for s in range(clt.n_layers):
            for i in range(clt.n_features):
                total = total + torch.tanh(scale * norm(clt, s, i) * a[t, s, i])
    return total / a.shape[0]


def pre_activation(clt, pre):
    """Mean over tokens of the sum of relu(threshold - h) norm, without gradient to the norms."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(pre.shape[0]):
        for s in range(clt.n_layers):
            for i in range(clt.n_features):
                gap = clt.log_threshold[s, i].exp() - pre[t, s, i]
                if gap > 0:
                    total = total + gap * norm(clt, s, i).detach()
    return total / pre.shape[0]


def jumprelu_gradients(pre, log_threshold, upstream, bandwidth, derivative):
    """The stated straight-through formula for one layer: gradients by pre-activation and by log-threshold."""
    by_pre = torch.zeros_like(pre)
    by_log = torch.zeros_like(log_threshold)
    for i in range(pre.shape[1]):
        theta = math.exp(log_threshold[i])
        for t in range(pre.shape[0]):
            if pre[t, i] > theta:
                by_pre[t, i] = upstream[t, i]
            if abs(pre[t, i] - theta) / bandwidth < 0.5:
                factor = theta if derivative == "chain" else 1.0
                by_log[i] += upstream[t, i] * -(theta / bandwidth) * factor
    return by_pre, by_log
