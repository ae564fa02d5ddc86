"""What the embedded model does, and where it does it.

Two interventions show whether the two-hop bridge is somewhere a graph can find it:

- **Exchange**: give the residual stream after a layer, at the last token of a city's name, the value it has
  for another city in the same question; the share of cases where the answer becomes the other place's. Counted
  over ordered pairs of held-out cities of the same kind whose names have the same number of tokens (so that
  nothing but the city differs) and whose capitals the model names.
- **Ablation**: replace the output of one MLP, or of all, by its mean over a text, as everywhere in this package
  except at BOS; the accuracy left on two-hop questions about held-out cities.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitmill.toyworld.families import TRAIN_TEMPLATES
from circuitmill.toyworld.pretrain import next_token_loss
from circuitmill.toyworld.questions import two_hop_question
from circuitmill.toyworld.tasks import Encoder, TaskScore, score_tasks
from circuitmill.toyworld.transformer import blocks
from circuitmill.toyworld.world import World

_BATCH = 256
_RELATION = "capital"
"""The relation whose answer is another one for every place."""


@contextmanager
def _edited(modules: list[nn.Module], edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Pass the output of each module through `edit(index, output)`."""

    def hook(index: int) -> Callable:
        def edit_output(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, tuple):
                return edit(index, output[0]), *output[1:]
            return edit(index, output)

        return edit_output

    handles = [module.register_forward_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: PreTrainedModel) -> Callable[[Int[Tensor, "item pos"]], Float[Tensor, "item pos d_vocab"]]:
    def logits(tokens: Int[Tensor, "item pos"]) -> Float[Tensor, "item pos d_vocab"]:
        with torch.inference_mode():
            return model(tokens, use_cache=False).logits

    return logits


def task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: dict[str, dict]
) -> dict[str, TaskScore]:
    """Accuracy on every task."""
    return score_tasks(tasks, tokenizer, _logits(model))


def windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], context: int) -> Int[Tensor, "sequence pos"]:
    """Documents as full windows, BOS in front of each document; what is left over is dropped."""
    stream = token_stream(tokenizer, documents)
    n_windows = len(stream) // context
    return torch.from_numpy(stream[: n_windows * context].astype(np.int64)).reshape(n_windows, context)


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Int[np.ndarray, " token"]:
    """Documents one after another, BOS in front of each."""
    encoder = Encoder(tokenizer)
    encoder.learn(sorted(set(documents)))
    return np.array([token for text in documents for token in (encoder.bos_id, *encoder(text))], dtype=np.int32)


def mean_loss(model: PreTrainedModel, text: Int[Tensor, "sequence pos"]) -> float:
    """Mean cross-entropy in nats per token."""
    logits = _logits(model)
    total = sum(next_token_loss(logits(tokens), tokens).item() * len(tokens) for tokens in text.split(_BATCH))
    return total / len(text)


def exchange(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> dict[str, float]:
    """Exchange figure after each layer (`after_layer_0`, ...), and `n_pairs`, the number of pairs counted."""
    encoder = Encoder(tokenizer)
    groups: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for city in sorted(world.held_cities):
        kind, size = world.place_of[city].kind, len(encoder(" " + city))
        groups[kind, size].append(two_hop_question(TRAIN_TEMPLATES[0], city, _RELATION, world))
    flips, n_pairs = [0] * len(blocks(model)), 0
    for (_, size), questions in groups.items():
        prefix = encoder(questions[0]["prompt"].split(" " + questions[0]["city"])[0])
        counts, n = _exchange_group(model, encoder, questions, place=len(prefix) + size)
        flips = [total + count for total, count in zip(flips, counts, strict=True)]
        n_pairs += n
    shares = {f"after_layer_{layer}": count / max(n_pairs, 1) for layer, count in enumerate(flips)}
    return {**shares, "n_pairs": n_pairs}


def _exchange_group(
    model: PreTrainedModel, encoder: Encoder, questions: list[dict], place: int
) -> tuple[list[int], int]:
    """Flips after each layer, and pairs, among questions that differ in one name of equal length.

    Args:
        place: Position of the name's last token.
    """
    logits = _logits(model)
    tokens = torch.tensor([[encoder.bos_id, *encoder(item["prompt"])] for item in questions])
    answers = torch.tensor([encoder.first(item["answer"]) for item in questions])
    residual: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor) -> Tensor:
        residual[layer] = output[:, place].clone()
        return output

    with _edited(blocks(model), keep):
        right = (logits(tokens)[:, -1].argmax(-1) == answers).nonzero().flatten().tolist()
    pairs = torch.tensor([(receiver, giver) for receiver in right for giver in right if receiver != giver])
    flips = [0] * len(residual)
    for layer, block in enumerate(blocks(model)):
        for receiver, giver in (chunk.unbind(1) for chunk in pairs.split(_BATCH) if len(chunk)):

            def give(_: int, output: Tensor, layer: int = layer, giver: Tensor = giver) -> Tensor:
                output = output.clone()
                output[:, place] = residual[layer][giver]
                return output

            with _edited([block], give):
                flips[layer] += int((logits(tokens[receiver])[:, -1].argmax(-1) == answers[giver]).sum())
    return flips, len(pairs)


def ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: dict,
    text: Int[Tensor, "sequence pos"],
) -> dict[str, float]:
    """Accuracy on a task with no MLP ablated (`none`), each one (`mlp_0`, ...) and `all`.

    Args:
        text: What the means are taken over.
    """
    mlps = [block.get_submodule("mlp") for block in blocks(model)]
    means = _mean_outputs(model, mlps, text, bos_id=Encoder(tokenizer).bos_id)
    which = {"none": [], **{f"mlp_{layer}": [layer] for layer in range(len(mlps))}, "all": list(range(len(mlps)))}
    out = {}
    for name, layers in which.items():

        def ablate(index: int, output: Tensor, layers: list[int] = layers) -> Tensor:
            ablated = means[layers[index]].expand_as(output).clone()
            ablated[:, 0] = output[:, 0]
            return ablated

        with _edited([mlps[layer] for layer in layers], ablate):
            out[name] = score_tasks({name: task}, tokenizer, _logits(model))[name].accuracy
    return out


def _mean_outputs(
    model: PreTrainedModel, mlps: list[nn.Module], text: Int[Tensor, "sequence pos"], bos_id: int
) -> list[Float[Tensor, " d_model"]]:
    sums = [torch.zeros((), dtype=torch.float64) for _ in mlps]
    counted = text[:0] != bos_id

    def add(layer: int, output: Tensor) -> Tensor:
        sums[layer] = sums[layer] + output[counted].double().sum(0)
        return output

    logits = _logits(model)
    with _edited(mlps, add):
        for tokens in text.split(_BATCH):
            counted = tokens != bos_id
            logits(tokens)
    return [(total / (text != bos_id).sum()).to(model.dtype) for total in sums]
