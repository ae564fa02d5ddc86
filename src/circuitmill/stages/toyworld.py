"""Stage `toyworld`: a corpus with known facts and algorithms, and a small language model trained on it.

| written | what |
|---|---|
| corpus/train.txt, corpus/heldout.txt | one document per line, UTF-8; split by hash of the text, for transcoders: the
  language model is trained on both |
| model/ | Hugging Face folder: config, weights (safetensors, float32), tokenizer |
| truth.json | tasks with answers, circuits with the concepts they pass through |
| metrics.jsonl | tokens, loss (nats per token), share of the peak learning rate |

The counts of the manifest hold what the model was measured to do: `accuracy` and `items` per task, `beyond`
(tasks that the truth leaves out), `exchange`, `ablation`, `loss`, sizes. Pretraining runs on the CPU in
float32.

A model below `accept` is trained further, up to `pretrain.extensions` times: some tasks appear late and suddenly, and
the processor's rounding decides on which side of the budget. The ledger has an entry `model` for the last model saved
(the number of extensions behind it) and an entry `extension_<i>` with the figures for which extension i was begun.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from circuitmill.config.toyworld import ToyworldConfig
from circuitmill.errors import ConfigError, DivergedError
from circuitmill.stores.files import atomic_write, canonical_json
from circuitmill.stores.manifest import Manifest, StageOutput
from circuitmill.toyworld import measure
from circuitmill.toyworld.corpus import split_documents, write_documents
from circuitmill.toyworld.families import FAMILIES
from circuitmill.toyworld.pretrain import Pretraining, Windows, pretrain, updates_after
from circuitmill.toyworld.questions import BEYOND, all_tasks
from circuitmill.toyworld.tasks import longest_item
from circuitmill.toyworld.tokenizer import BOS_ID, make_tokenizer
from circuitmill.toyworld.transformer import key_query_scale, make_transformer
from circuitmill.toyworld.truth import truth
from circuitmill.toyworld.world import World, make_world

_log = logging.getLogger(__name__)


def run(cfg: ToyworldConfig, *, out: Path) -> Manifest:
    """Make the corpus, the tokenizer, the model and the truth about them.

    Raises:
        ConfigError: the mix names an unknown family, or `accept` an unknown figure, or the context is too short
            for the questions.
        DivergedError: the loss is not finite, or a measured figure is still below `accept` after all extensions.
    """
    _check_names("toyworld.corpus.mix", cfg.corpus.mix, tuple(FAMILIES))
    world = make_world(cfg.seed)
    tasks = all_tasks(world)
    _check_names("toyworld.accept", cfg.accept, (*tasks, *_DERIVED))
    output = StageOutput("toyworld", cfg, {}, out)

    documents = write_documents(world, cfg.corpus.mix, cfg.corpus.documents)
    train, heldout = split_documents(documents, cfg.corpus.heldout_share)
    atomic_write(output.path("corpus", "train.txt"), "\n".join(train) + "\n")
    atomic_write(output.path("corpus", "heldout.txt"), "\n".join(heldout) + "\n")
    atomic_write(output.path("truth.json"), json.dumps(truth(world), indent=1, ensure_ascii=False) + "\n")

    tokenizer = make_tokenizer(documents)
    _check_context(cfg, tokenizer, tasks)
    stream = measure.token_stream(tokenizer, documents)
    text = measure.windows(tokenizer, heldout, cfg.transformer.context)
    before = _begun(cfg, output)
    while True:
        model = _trained(cfg, tokenizer, stream, output, extension=len(before))
        figures = _measure(model, tokenizer, world, tasks, text)
        short = _short(cfg, figures)
        if not short or len(before) == cfg.pretrain.extensions:
            break
        before.append(_begin(cfg, figures, short, output, extension=len(before) + 1))
    _accept(cfg, short)
    shutil.rmtree(output.path("checkpoints"), ignore_errors=True)  # an extension would have begun with the last
    return output.finish(
        {
            "documents": {"train": len(train), "heldout": len(heldout)},
            "tokens": len(stream),
            "pretrain_tokens": updates_after(cfg.pretrain, len(before)) * cfg.pretrain.batch_tokens,
            "parameters": model.num_parameters(),
            "d_vocab": len(tokenizer),
            "extensions": len(before),
            "before_extension": before,
            **figures,
        }
    )


def _begun(cfg: ToyworldConfig, output: StageOutput) -> list[dict]:
    """The figures for which each extension was begun, in order, from the ledger of a run that was broken off."""
    entries = (output.ledger.get(f"extension_{number + 1}") for number in range(cfg.pretrain.extensions))
    return [entry for entry in entries if entry is not None]


def _begin(cfg: ToyworldConfig, figures: dict, short: dict[str, float], output: StageOutput, *, extension: int) -> dict:
    """Note that an extension begins, and why. Returns the figures as the ledger will give them after a break."""
    _log.info(
        "%s: pretraining goes on for %d tokens (extension %d of at most %d)",
        ", ".join(f"{name} {found:.3f} is below {cfg.accept[name]:g}" for name, found in short.items()),
        cfg.pretrain.extension_tokens,
        extension,
        cfg.pretrain.extensions,
    )
    kept = json.loads(canonical_json({name: value for name, value in figures.items() if name != "items"}))
    output.ledger.put(f"extension_{extension}", **kept)
    return kept


def _trained(
    cfg: ToyworldConfig,
    tokenizer: PreTrainedTokenizerBase,
    stream: Int[np.ndarray, " token"],
    output: StageOutput,
    *,
    extension: int,
) -> PreTrainedModel:
    """The model after a number of extensions, from disk: what is measured is what was saved."""
    saved = output.ledger.get("model")
    if saved is None or saved["extensions"] < extension:
        _train(cfg, tokenizer, stream, output, extension=extension)
    return AutoModelForCausalLM.from_pretrained(output.path("model"), local_files_only=True).eval()


def _train(
    cfg: ToyworldConfig,
    tokenizer: PreTrainedTokenizerBase,
    stream: Int[np.ndarray, " token"],
    output: StageOutput,
    *,
    extension: int,
) -> None:
    windows = Windows(stream, bos_id=BOS_ID, context=cfg.transformer.context, seed=cfg.seed)
    model = make_transformer(cfg.transformer, d_vocab=len(tokenizer), bos_id=BOS_ID, seed=cfg.seed)
    scale = key_query_scale(cfg.transformer)

    def save(model: PreTrainedModel, folder: str = "early") -> None:
        model.save_pretrained(output.path(folder))
        tokenizer.save_pretrained(output.path(folder))
        if hasattr(model.config, "activation_function"):
            _name_activation(output.path(folder, "config.json"))

    run = Pretraining(model, cfg.pretrain, key_query_scale=scale, extension=extension)
    pretrain(run, windows, output, early=save)
    save(model, "model")
    output.ledger.put("model", extensions=extension)


def _name_activation(path: Path) -> None:
    """Call the activation what TransformerLens calls it; transformers has a faster one of the same function."""
    config = json.loads(path.read_text())
    atomic_write(path, json.dumps(config | {"activation_function": "gelu_new"}, indent=2, sort_keys=True) + "\n")


_DERIVED = ("exchange", "mlps_needed")
"""Figures that `accept` can name beside the tasks, both better when larger: the best exchange after any layer between
the first and the last, and one minus the two-hop accuracy that is left without MLPs."""


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    tasks: dict,
    text: Int[Tensor, "sequence pos"],
) -> dict:
    scores = measure.task_scores(model, tokenizer, tasks)
    ablation = measure.ablation(model, tokenizer, tasks["two_hop_city"], text)
    return {
        "accuracy": {name: score.accuracy for name, score in scores.items() if name not in BEYOND},
        "beyond": {name: scores[name].accuracy for name in BEYOND},
        "items": {name: score.n for name, score in scores.items()},
        "exchange": measure.exchange(model, tokenizer, world),
        "ablation": ablation,
        "loss": measure.mean_loss(model, text),
    }


def _short(cfg: ToyworldConfig, figures: dict) -> dict[str, float]:
    """The figures below their bars, with what was found."""
    # The first layer only gathers the pieces of a name; after the last nothing moves between positions any more.
    carried = [figures["exchange"][f"after_layer_{layer}"] for layer in range(1, cfg.transformer.n_layers - 1)]
    found = {
        **figures["accuracy"],
        **figures["beyond"],
        "exchange": max(carried, default=0.0),
        "mlps_needed": 1 - figures["ablation"]["all"],
    }
    return {name: found[name] for name, bar in cfg.accept.items() if found[name] < bar}


def _accept(cfg: ToyworldConfig, short: dict[str, float]) -> None:
    if short:
        after = f" after {cfg.pretrain.extensions} extension(s) of pretraining" if cfg.pretrain.extensions else ""
        raise DivergedError(
            "a model with " + ", ".join(f"{name} >= {cfg.accept[name]:g}" for name in short),
            found=", ".join(f"{name} {found:.3f}" for name, found in short.items()) + after,
            where="toyworld.accept",
            fix="raise toyworld.pretrain.tokens or extensions, take another toyworld.seed, or lower the bar",
        )


def _check_context(cfg: ToyworldConfig, tokenizer: PreTrainedTokenizerBase, tasks: dict) -> None:
    longest = max(longest_item(tokenizer, task) for task in tasks.values())
    if longest > cfg.transformer.context:
        raise ConfigError(
            f"a context of at least {longest}, the longest question",
            found=cfg.transformer.context,
            where="toyworld.transformer.context",
            fix="raise it",
        )


def _check_names(key: str, given: dict, known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(
            "names among " + ", ".join(known),
            found=", ".join(unknown),
            where=key,
            fix="remove or correct them",
        )
