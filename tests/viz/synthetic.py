"""A made-up run with the shapes of a real one: 4 layers, graphs of about 80 nodes and 400 links, features with windows.

Texts that would break a careless page are planted on purpose: markup, quotes, newlines, an end-of-script tag.
"""

import math
import random

from circuitmill.stores.graphs import ERROR_NODE, FEATURE_NODE, cantor
from circuitmill.viz.evaluation_view import Evaluation, _evaluation

N_LAYERS, N_FEATURES = 4, 128
BOS = "<|endoftext|>"
NASTY = "</script><img src=x onerror=alert(1)>"
CITIES = [("Dallas", "Texas", "Austin"), ("Miami", "Florida", "Tallahassee"), ("Fargo", "North Dakota", "Bismarck")]
WORDS = [" the", " capital", " of", " state", " is", " river", " Da", "ll", "as", " said", "\n", ' "quoted"', " a", "."]


def pieces(word: str) -> list[str]:
    """A word in two-letter tokens, the first with its space."""
    return [" " + word[:2], *(word[i : i + 2] for i in range(2, len(word), 2))]


def prompt_tokens(city: str) -> list[str]:
    return [BOS, "The", " capital", " of", " the", " state", " containing", *pieces(city), " is"]


def explanation(layer: int, feature: int) -> str:
    rng = random.Random(layer * 1000 + feature)
    city, state, capital = rng.choice(CITIES)
    return rng.choice(
        [
            f'fires on "{city}", "Waco", "Houston"; promotes " {state}"',
            f"end of city names in {state}",
            "fires on “ of the state”",
            f"promotes {capital}, {state}",
            "fires on “ is” after a place; promotes capitals",
            "numbers from 10 to 19 <b>bold</b>",
        ]
    )


def graph(name: str, city: str, state: str, capital: str, seed: int = 0) -> dict:
    """A pruned graph in circuit-tracer's JSON."""
    rng = random.Random(seed)
    tokens = prompt_tokens(city)
    last = len(tokens) - 1
    nodes, rank = [], 0

    def node(identity: str, kind: str, layer: str, pos: int, feature: int, clerp: str, **extra: object) -> dict:
        base = {"node_id": identity, "feature": feature, "layer": layer, "ctx_idx": pos, "feature_type": kind}
        rest = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": identity}
        return base | rest | {"clerp": clerp, "influence": None, "activation": None} | extra

    for pos in range(1, len(tokens)):
        nodes.append(node(f"E_{pos + 7}_{pos}", "embedding", "E", pos, pos, f'Emb: "{tokens[pos]}"', influence=0.99))
    picked = set()
    for layer in range(N_LAYERS):
        for pos in range(1, len(tokens)):
            many = rng.choice([0, 1, 1, 2]) + (3 if pos in (last, last - 1) else 0)
            for _ in range(many):
                feature = rng.randrange(N_FEATURES)
                if (layer, feature, pos) in picked:
                    continue
                picked.add((layer, feature, pos))
                rank += 1
                text = explanation(layer, feature)
                extra = {"influence": min(0.8, 0.03 * rank**0.75), "activation": round(rng.expovariate(0.6), 3)}
                nodes.append(
                    node(
                        f"{layer}_{feature}_{pos}", FEATURE_NODE, str(layer), pos, cantor(layer, feature), text, **extra
                    )
                )
            if rng.random() < 0.12:
                nodes.append(
                    node(f"{layer}_-1_{pos}", ERROR_NODE, str(layer), pos, -1, f"Err: mlp {layer}", influence=0.78)
                )
    outputs = [(f" {capital}", 0.93), (f" {state}", 0.03), (" Paris", 0.01), (NASTY, 0.005)]
    for place, (text, probability) in enumerate(outputs):
        extra = {"token_prob": probability, "is_target_logit": place == 0, "influence": 1.0}
        nodes.append(
            node(
                f"{N_LAYERS + 1}_{900 + place}_{last}",
                "logit",
                str(N_LAYERS + 1),
                last,
                900 + place,
                f'Output "{text}" (p={probability:.3f})',
                **extra,
            )
        )
    return {
        "metadata": {
            "slug": name,
            "scan": "./data/features",
            "transcoder_list": [],
            "prompt": "".join(tokens[1:]),
            "prompt_tokens": tokens,
            "node_threshold": 0.8,
            "schema_version": 1,
            "replacement_score": round(rng.uniform(0.6, 0.9), 3),
            "completeness": round(rng.uniform(0.8, 0.96), 3),
            "unattributed": round(rng.uniform(0.01, 0.1), 3),
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links(nodes, rng),
    }


def links(nodes: list[dict], rng: random.Random) -> list[dict]:
    """Edges upwards and rightwards, as attention and decoders allow."""

    def height(node: dict) -> int:
        return -1 if node["layer"] == "E" else int(node["layer"])

    found = []
    for target in nodes:
        if target["feature_type"] not in (FEATURE_NODE, "logit"):
            continue
        below = [
            n
            for n in nodes
            if height(n) < height(target) and n["ctx_idx"] <= target["ctx_idx"] and n["feature_type"] != "logit"
        ]
        for source in rng.sample(below, min(len(below), 6)):
            weight = rng.choice([1, 1, 1, -1]) * rng.lognormvariate(-1.5, 1)
            found.append({"source": source["node_id"], "target": target["node_id"], "weight": round(weight, 4)})
    return found


def summary(name: str, kind: str | None, state: str, capital: str, document: dict) -> dict:
    """A prompt's entry in attribute's summary; one without a kind expects nothing."""
    best = next((n for n in document["nodes"] if n["feature_type"] == FEATURE_NODE and state in n["clerp"]), None)
    place = None
    if best:
        layer, feature, pos = (int(part) for part in best["node_id"].split("_"))
        place = {
            "layer": layer,
            "pos": pos,
            "feature": feature,
            "influence": best["influence"],
            "evidence": "explanation",
        }
    concept = {"name": state, "found": best is not None, "at_expected_pos": False, "n_features": 1, "best": place}
    metadata = document["metadata"]
    return {
        "prompt": name,
        "text": metadata["prompt"],
        "kind": kind,
        **{key: metadata[key] for key in ("replacement_score", "completeness", "unattributed")},
        "targets": [],
        "prediction": {"token": 900, "text": f" {capital}", "probability": 0.93},
        "predicted": None if kind is None else True,
        "edge_check": {"relative": 3.1e-6},
        "expected": None if kind is None else {"answers": [f" {capital}"], "first_tokens": [900], "concepts": []},
        "concepts": [] if kind is None else [concept],
    }


def metrics(steps: int = 500) -> list[dict]:
    """Rows of training metrics; every tenth has what is measured on held-out tokens."""
    rng = random.Random(1)
    rows = []
    for step in range(1, steps + 1):
        done = step / steps
        noise = 1 + 0.05 * rng.gauss(0, 1)
        ev = [1 - math.exp(-9 * done - layer / 3) * noise for layer in range(N_LAYERS)]
        l0 = [60 * math.exp(-5 * done) + 3 + layer for layer in range(N_LAYERS)]
        rows.append(
            {
                "step": step,
                "tokens": step * 2048,
                "loss": 460 * math.exp(-5 * done) * noise + 5,
                "loss_reconstruction": 400 * math.exp(-6 * done) * noise + 3,
                "loss_tanh_sparsity": 40 * (1 - done) + 6 * noise,
                "loss_pre_activation": 9 * noise,
                "loss_auxiliary": 0.0,
                "ev": sum(ev) / N_LAYERS,
                "ev_per_layer": ev,
                "l0": l0,
                "dead": 0.3 * done * (1 - 0.6 * done),
                "lr": 4e-3 * min(1, done * 20) * min(1, 5 * (1 - done)),
                "coefficients": {
                    "reconstruction": 1.0,
                    "tanh_sparsity": 4.0 * done,
                    "pre_activation": 3e-4,
                    "auxiliary": 0.03,
                },
                "grad_norm": 20 * math.exp(-3 * done) * abs(noise),
                "tokens_per_second": None if step == 1 else 21_000 * noise,
                "data_wait_share": 0.04 * abs(noise),
                "peak_memory_bytes": 1_200_000_000,
            }
            | (measured(ev, l0, done) if step % 10 == 0 else {})
        )
    return rows


def measured(ev: list[float], l0: list[float], done: float) -> dict:
    """What is measured now and then."""
    edges = [-5 + 0.2 * bar for bar in range(26)]
    bars = [[int(30 * math.exp(-((edge + 2 + layer / 4) ** 2))) for edge in edges[1:]] for layer in range(N_LAYERS)]
    thresholds = [[3, 90, 30, 5], [0, 60, 60, 8], [0, 40, 80, 8], [1, 20, 100, 7]]
    return {
        "heldout_ev": sum(ev) / N_LAYERS - 0.02,
        "heldout_ev_per_layer": [value - 0.02 for value in ev],
        "heldout_l0": l0,
        "heldout_l0_percentiles": {
            "p5": [int(0.4 * value) for value in l0],
            "p50": [int(0.9 * value) for value in l0],
            "p95": [int(2.1 * value) for value in l0],
        },
        "dead_features": [3, 0, 7, 12],
        "density_histogram": {"log10_edges": edges, "counts": bars},
        "threshold_histogram": {"log10_edges": [-1.4, -1.2, -1.0, -0.8, -0.6], "counts": thresholds},
        "decoder_norm_histogram": {"log10_edges": [-0.4, -0.2, 0.0, 0.2, 0.4], "counts": thresholds},
        "replacement_agreement": 0.3 + 0.65 * done,
        "replacement_ce_recovered": 0.5 + 0.49 * done,
        "replacement_kl": 3 * math.exp(-4 * done),
    }


def evaluation_document(l0: float = 28.0) -> dict:
    """The content of evaluation.json."""
    rng = random.Random(2)
    edges = [-6 + 0.25 * i for i in range(25)]
    counts = [
        [int(30 * math.exp(-((edge + 2.5 - layer / 8) ** 2)) * rng.uniform(0.8, 1.2)) for edge in edges[1:]]
        for layer in range(N_LAYERS)
    ]
    dead = [3, 0, 7, 12]
    behaviour = {
        "original": {"cross_entropy": 1.234},
        "replacement": {"agreement": 0.93 + l0 / 1000, "kl": 0.09 - l0 / 1000, "cross_entropy": 1.291},
        "mean_ablation": {"agreement": 0.018, "kl": 6.9, "cross_entropy": 7.9},
        "zero_ablation": {"agreement": 0.02, "kl": 6.5, "cross_entropy": 7.5},
    }
    for name, row in behaviour.items():
        if name != "original":
            row["ce_recovered_zero"] = (7.5 - row["cross_entropy"]) / (7.5 - 1.234)
            row["ce_recovered_mean"] = (7.9 - row["cross_entropy"]) / (7.9 - 1.234)
    tasks = [
        ("two_hop_city", 1680, 0.96, 0.93, 0.08),
        ("induction", 400, 1.0, 1.0, 0.42),
        ("greater_than", 400, 0.9, 0.88, 0.1),
    ]
    return {
        "format": 2,
        "transcoder": {
            "topology": "clt",
            "n_layers": N_LAYERS,
            "n_sources": N_LAYERS,
            "n_features": N_FEATURES,
            "d_model": 128,
        },
        "places": [f"mlp.{layer}" for layer in range(N_LAYERS)],
        "tokens": {"evaluated": 37800},
        "fit": {
            "explained_variance": 0.991 + l0 / 10000,
            "per_layer": {"explained_variance": [0.985, 0.992, None, 0.993]},
        },
        "sparsity": {
            "l0": l0,
            "dead": sum(dead),
            "per_layer": {
                "l0": [l0 / 4 - 1, l0 / 4, l0 / 4 + 1, l0 / 4],
                "l0_percentiles": {"p5": [2, 3, 4, 3], "p95": [11, 12, 14, 13]},
                "dead": dead,
            },
        },
        "density_histogram": {"log10_edges": edges, "counts": counts},
        "unreplaceable": None,
        "behaviour": behaviour,
        "one_layer": [{"replacement": {"kl": 0.01 * layer}} for layer in range(N_LAYERS)],
        "tasks": [
            dict(zip(("name", "n", "original", "replacement", "mean_ablation"), task, strict=True)) for task in tasks
        ],
    }


def unreplaceable_document(topology: str = "sae", l0: float = 28.0) -> dict:
    """The content of evaluation.json for a transcoder of the residual stream."""
    document = evaluation_document(l0)
    document["transcoder"]["topology"] = topology
    document["places"] = [f"resid_post.{layer}" for layer in range(N_LAYERS)]
    document["unreplaceable"] = f"topology {topology} writes what it reads, not what MLPs write"
    if topology == "crosscoder":
        document["transcoder"]["n_sources"] = 1
        document["sparsity"] |= {
            "dead": 3,
            "per_layer": {"l0": [l0], "l0_percentiles": {"p5": [4], "p95": [60]}, "dead": [3]},
        }
        document["density_histogram"]["counts"] = document["density_histogram"]["counts"][:1]
    return document | dict.fromkeys(("behaviour", "one_layer", "tasks"))


def evaluation(l0: float = 28.0) -> Evaluation:
    """What is read of it."""
    return _evaluation(evaluation_document(l0))


def study() -> dict:
    """The content of study.json: three codecs, the last of which lost something."""
    kinds = ("by_id", "matched", "matched_other_seed")
    groups = []
    for place, codec in enumerate(("bf16", "int8", "int2")):
        worse = {"ev": -0.004 * place**3, "l0": 0.4 * place, "kl": 0.002 * place**3, "replacement_score": -0.01 * place}
        groups.append(
            {
                "name": codec,
                "options": {"cache.codec": codec},
                "variants": [f"{codec}-{seed}" for seed in range(3)],
                "cache_bytes": 800_000_000 // 2**place,
                "means": {"ev": 0.9876, "l0": 28.25, "kl": 0.0123, "replacement_score": 0.734},
                "differences": {
                    key: {"mean": mean, "low": mean - 0.005, "high": mean + 0.005, "n": 3, "method": "paired"}
                    for key, mean in worse.items()
                }
                if place
                else None,
                "overlaps": {kind: {"mean": 0.41 if place != 2 else 0.3, "pairs": 3} for kind in kinds},
                "no_lower": dict.fromkeys(kinds, place == 1) if place else None,
            }
        )
    prompts = ["two_hop-00", "two_hop-01"]
    return {"keys": ["cache.codec"], "baseline": "bf16", "confidence": 0.95, "prompts": prompts, "groups": groups}


def logits(rng: random.Random) -> list[dict]:
    texts = [" Austin", " Texas", NASTY, " Houston", "\n", ' "', "ll", " Paris", " red", " 17"]
    return [{"token": i, "text": text, "value": 2.5 * 0.8**i + rng.random() / 10} for i, text in enumerate(texts)]


def feature_row(layer: int, feature: int) -> dict:
    rng = random.Random(layer * 7919 + feature)
    density = 10 ** rng.uniform(-4, -1.3)
    top = rng.uniform(2, 9)
    return {
        "layer": layer,
        "feature": feature,
        "density": density,
        "n_active": int(density * 600_000),
        "act_max": top,
        "act_mean": top / 3,
        "histogram": [int(2000 * math.exp(-i / 3)) for i in range(20)],
        "histogram_edges": [top * i / 20 for i in range(21)],
        "quantile_values": [top * q / 100 for q in range(1, 100)],
        "top_logits": logits(rng),
        "bottom_logits": [entry | {"value": -entry["value"]} for entry in logits(rng)],
    }


def explanation_row(layer: int, feature: int) -> dict:
    rng = random.Random(layer * 31 + feature)
    scored = rng.random() > 0.1
    return {
        "layer": layer,
        "feature": feature,
        "explanation": explanation(layer, feature),
        "explainer": "tokens",
        "detection": rng.uniform(0.6, 1) if scored else None,
        "precision": rng.uniform(0.6, 1) if scored else None,
        "recall": rng.uniform(0.6, 1) if scored else None,
        "n_scored": 20 if scored else 0,
        "words": ["Dallas"],
        "promotes": ["Texas"],
    }


def windows(layer: int, feature: int, top: float) -> list[dict]:
    rng = random.Random(layer * 17 + feature)
    found = []
    for kind, quantile, many in (("top", 0, 14), ("quantile", 75, 3), ("quantile", 50, 3), ("silent", 0, 4)):
        for rank in range(many):
            texts = [BOS] + [rng.choice([*WORDS, NASTY if rng.random() < 0.05 else " the"]) for _ in range(23)]
            peak = rng.randrange(4, 24) if kind != "silent" else -1
            level = top * (0.97**rank if kind == "top" else (quantile + 20) / 100)
            activations = [
                level if i == peak else level * rng.random() * (rng.random() < 0.15 and peak > 0 and i > 0)
                for i in range(24)
            ]
            found.append(
                {
                    "layer": layer,
                    "feature": feature,
                    "split": "train",
                    "kind": kind,
                    "rank": rank,
                    "quantile": quantile,
                    "texts": texts,
                    "activations": activations,
                    "peak": peak,
                }
            )
    return found
