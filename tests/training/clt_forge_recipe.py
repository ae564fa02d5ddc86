"""CLT-Forge's recipe for JumpReLU cross-layer transcoders, written again from its description, as plainly as possible.

    yhat^m = sum over l <= m of (W_dec^{l->m} a^l + b^{l->m}),   a = h H(h - theta), theta = exp(t)
    L = sum_m mean ||y^m - yhat^m||^2 + lambda(t) mean sum tanh(4 a n) + c mean sum relu(theta - h) n

n is the length of a feature's concatenated decoders and gets gradients from both penalties. W_enc ~ U(+-1/sqrt F),
W_dec ~ U(+-1/sqrt(L d)), biases zero, theta = .03, bandwidth 1. Adam without warm-up; the rate falls linearly over 5%
of the training and is zero over the last 25%; lambda rises linearly over the first 70%.
"""

import math

import torch

from circuitmill.core.nonlinearity import jumprelu

CONSTANT = 4.0


class Recipe:
    """Parameters, optimizer and one step."""

    def __init__(self, n_layers, n_features, d_model, *, steps, lr, sparsity, dead_penalty, betas, seed):
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound, *shape):
            return ((torch.rand(shape, generator=generator) * 2 - 1) * bound).requires_grad_()

        self.n_layers, self.steps, self.lr = n_layers, steps, lr
        self.sparsity, self.dead_penalty = sparsity, dead_penalty
        self.pairs = [(s, t) for s in range(n_layers) for t in range(s, n_layers)]
        self.W_enc = uniform(1 / math.sqrt(n_features), n_layers, n_features, d_model)
        self.b_enc = torch.zeros(n_layers, n_features, requires_grad=True)
        self.W_dec = uniform(1 / math.sqrt(n_layers * d_model), len(self.pairs), n_features, d_model)
        self.b_dec = torch.zeros(len(self.pairs), d_model, requires_grad=True)
        self.t = torch.full((n_layers, n_features), math.log(0.03), requires_grad=True)
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.t]
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=betas)

    def loss(self, x, y, step):
        """All three terms at the coefficients of this step."""
        h = torch.einsum("nld,lfd->nlf", x, self.W_enc) + self.b_enc
        a = jumprelu(h, self.t, 1.0)
        y_hat = [torch.zeros_like(y[:, 0]) for _ in range(self.n_layers)]
        squares = [torch.zeros(h.shape[2]) for _ in range(self.n_layers)]
        for p, (s, t) in enumerate(self.pairs):
            y_hat[t] = y_hat[t] + a[:, s] @ self.W_dec[p] + self.b_dec[p]
            squares[s] = squares[s] + self.W_dec[p].square().sum(dim=1)
        norms = torch.stack(squares).sqrt()
        fit = (y - torch.stack(y_hat, dim=1)).square().sum(dim=2).mean(dim=0).sum()
        active = torch.tanh(CONSTANT * a * norms).sum(dim=(1, 2)).mean()
        idle = ((self.t.exp() - h).relu() * norms).sum(dim=(1, 2)).mean()
        ramp = min(1.0, (step + 1) / (0.7 * self.steps))
        return fit + self.sparsity * ramp * active + self.dead_penalty * idle

    def step(self, x, y, step):
        """One update."""
        loss = self.loss(x, y, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        left = (0.75 * self.steps - step) / (0.05 * self.steps)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * min(1.0, max(0.0, left))
        self.adam.step()
        self.adam.zero_grad()
