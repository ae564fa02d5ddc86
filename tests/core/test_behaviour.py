import torch

from circuitmill.core.behaviour import Behaviour

BOS = 1


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[BOS, 3, 4, BOS, 2, 5], [2, 2, BOS, BOS, 3, 0]])
    return tokens, torch.randn(2, 6, 7, generator=generator), torch.randn(2, 6, 7, generator=generator)


def test_sums_equal_a_plain_loop_without_bos() -> None:
    tokens, logits, changed = example()
    behaviour = Behaviour()
    behaviour.update(logits, changed, tokens, BOS)
    kl, agreeing, loss = [], [], []
    for row in range(2):
        for pos in range(6):
            if tokens[row, pos] == BOS:
                continue
            p, q = logits[row, pos].softmax(0), changed[row, pos].softmax(0)
            kl.append(float((p * (p / q).log()).sum()))
            agreeing.append(int(p.argmax() == q.argmax()))
            if pos < 5 and tokens[row, pos + 1] != BOS:
                loss.append(-float(q[tokens[row, pos + 1]].log()))
    assert behaviour.n_tokens == 8
    assert behaviour.n_predicted == len(loss) == 4
    assert abs(behaviour.kl() - sum(kl) / 8) < 1e-6
    assert behaviour.agreement() == sum(agreeing) / 8
    assert abs(behaviour.cross_entropy() - sum(loss) / 4) < 1e-6


def test_batches_add_up() -> None:
    tokens, logits, changed = example()
    whole, parts = Behaviour(), Behaviour()
    whole.update(logits, changed, tokens, BOS)
    for row in range(2):
        parts.update(logits[row : row + 1], changed[row : row + 1], tokens[row : row + 1], BOS)
    assert abs(whole.kl() - parts.kl()) < 1e-9
    assert (whole.agreement(), whole.n_predicted) == (parts.agreement(), parts.n_predicted)


def test_the_same_model_agrees_with_itself() -> None:
    tokens, logits, _ = example()
    behaviour = Behaviour()
    behaviour.update(logits, logits, tokens, BOS)
    assert behaviour.agreement() == 1.0 and behaviour.kl() == 0.0
