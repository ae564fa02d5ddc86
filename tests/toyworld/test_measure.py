import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from circuitmill.toyworld import facts
from circuitmill.toyworld.measure import ablation, exchange, mean_loss, token_stream, windows
from circuitmill.toyworld.questions import all_tasks
from circuitmill.toyworld.tasks import Encoder
from circuitmill.toyworld.world import World


class Step(nn.Module):
    """A block that does one thing to the residual stream; its MLP adds what it is told to."""

    def __init__(self, model: "Mechanism"):
        super().__init__()
        self.mlp = nn.Identity()
        self.owner = [model]

    def forward(self, x: Tensor) -> Tensor:
        return x


class Assemble(Step):
    """Writes the capital to the place where a city's name ends."""

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self.owner
        out = torch.zeros_like(x)
        for row, ids in enumerate(model.tokens.tolist()):
            for city, answer in model.capitals.items():
                for start in range(len(ids) - len(city) + 1):
                    if tuple(ids[start : start + len(city)]) == city:
                        out[row, start + len(city) - 1, answer] = 1.0
        return x + self.mlp(out)


class Move(Step):
    """Adds everything before to the last position."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, -1] = x.sum(1)
        return x + out + 0 * self.mlp(x)


class Mechanism(PreTrainedModel):
    """A hand-made model that answers with capitals in two steps; the residual stream is the vocabulary."""

    config_class = PretrainedConfig

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(PretrainedConfig())
        self.d_vocab = len(tokenizer)
        encoder = Encoder(tokenizer)
        self.capitals = {
            tuple(encoder(" " + city)): encoder.first(" " + place.relations["capital"])
            for place in facts.PLACES
            for city in place.cities
        }
        self.precision = nn.Parameter(torch.zeros(()))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Assemble(self), Move(self)])

    def forward(self, tokens: Tensor, use_cache: bool = False) -> CausalLMOutput:
        self.tokens = tokens
        x = torch.zeros(*tokens.shape, self.d_vocab)
        for block in self.model.layers:
            x = block(x)
        return CausalLMOutput(logits=x)


@pytest.fixture(scope="module")
def mechanism(tokenizer: PreTrainedTokenizerFast) -> Mechanism:
    return Mechanism(tokenizer)


def test_exchange_finds_where_the_answer_is_carried(
    mechanism: Mechanism, tokenizer: PreTrainedTokenizerFast, world: World
):
    figures = exchange(mechanism, tokenizer, world)
    assert figures["n_pairs"] > 500
    assert figures["after_layer_0"] == 1.0, "between the two steps it is at the city"
    assert figures["after_layer_1"] == 0.0, "after them it is at the end"


def test_ablation_finds_the_mlp_that_is_needed(
    mechanism: Mechanism, tokenizer: PreTrainedTokenizerFast, world: World, heldout: list[str]
):
    task = all_tasks(world)["two_hop_city"]
    capitals = [item for item in task["items"] if item["relation"] == "capital"][::40]
    text = windows(tokenizer, heldout[:20], 32)
    accuracy = ablation(mechanism, tokenizer, {**task, "items": capitals}, text)
    assert accuracy == {"none": 1.0, "mlp_0": pytest.approx(0, abs=0.2), "mlp_1": 1.0, "all": accuracy["mlp_0"]}


def test_nothing_stays_hooked(mechanism: Mechanism):
    assert not any(module._forward_hooks for module in mechanism.modules())


def test_stream_and_windows(tokenizer: PreTrainedTokenizerFast):
    stream = token_stream(tokenizer, ["Every bird", "36+59"])
    assert tokenizer.convert_ids_to_tokens(stream.tolist()) == [
        "<|endoftext|>", "Every", "Ġbird", "<|endoftext|>", "3", "6", "+", "5", "9",
    ]  # fmt: skip
    batch = windows(tokenizer, ["Every bird", "36+59"], 4)
    assert batch.tolist() == [stream[:4].tolist(), stream[4:8].tolist()]


def test_loss_of_one_who_knows_nothing(mechanism: Mechanism, tokenizer: PreTrainedTokenizerFast, heldout: list[str]):
    text = windows(tokenizer, [document for document in heldout if "+" in document], 16)
    loss = mean_loss(mechanism, text)
    assert loss == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), abs=0.05)
