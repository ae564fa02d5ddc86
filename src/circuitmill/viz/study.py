"""The study: what a difference in a shared stage, say the codec of the cache, does to what is trained and traced.

Variants are grouped by the configuration keys of shared stages in which they differ. Each group is compared with a
baseline: in figures of the evaluation and of the graphs, paired by seed where the seeds are the same, and in the
feature nodes of the graphs of the same prompts. How far two graphs may differ is read off the baseline itself, between
two of its seeds.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from circuitmill.core import statistics
from circuitmill.core.matching import mutual_matches
from circuitmill.errors import UpstreamError
from circuitmill.stores.files import digest_of
from circuitmill.stores.graphs import graph_features, read_graph, read_json, rounded
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.stores.transcoders import read_decoder
from circuitmill.viz.evaluation_view import read_evaluation
from circuitmill.viz.formatting import Real
from circuitmill.viz.run_view import unit_manifests, variant_name

FIGURES = ("ev", "l0", "kl", "replacement_score")
EXACT = ("float32", "bf16")
"""Codecs that serve as the baseline, the first there is."""
PER_VARIANT = ("train", "evaluate", "attribute")

Node = tuple[int, int, int]
"""Layer, feature, position."""


@dataclass(frozen=True)
class Member:
    """One variant of the run."""

    name: str
    options: Mapping[str, Any]
    """Dotted key -> value, for all keys of the shared stages that were given."""
    cache: Manifest
    seed: int
    settings: str
    """Everything else that decides its results: members that agree in it differ by seed and shared stages alone."""
    figures: Mapping[str, Real | None]
    """By the names of `FIGURES`."""
    prompts: Mapping[str, str]
    """Name -> text of every graph; none of a transcoder that cannot be traced."""
    nodes: Mapping[str, frozenset[Node]]
    """Name of the graph -> its feature nodes."""
    model: Path
    """Folder of the transcoder."""
    digest: str
    """Changes with anything of this variant that the study reads."""


Pair = tuple[Member, Member]


def read_members(paths: Iterable[Path]) -> list[Member]:
    """Read the variants of a run.

    Args:
        paths: For every variant the manifests of train, evaluate and attribute, and those of the shared stages in
            which variants differ; in the order of the variants.

    Raises:
        UpstreamError: a manifest is missing or damaged, or does not belong to the others.
        StoreError: a file of theirs is damaged.
    """
    found: dict[str, dict[str, Manifest]] = {name: {} for name in PER_VARIANT}
    shared: dict[str, Manifest] = {}
    for path in paths:
        manifest = load_manifest(path)
        if manifest.stage in found:
            found[manifest.stage][variant_name(manifest)] = manifest
        else:
            shared[manifest.digest] = manifest
    return [_member(name, {stage: found[stage].get(name) for stage in PER_VARIANT}, shared) for name in found["train"]]


def _member(name: str, stages: Mapping[str, Manifest | None], shared: Mapping[str, Manifest]) -> Member:
    train, evaluate, attribute = _belonging(name, stages)
    cache = shared.get(train.inputs.get("cache", ""))
    if cache is None:
        raise UpstreamError(
            f"the manifest of the cache that variant {name} was trained on",
            found="none",
            where="--study",
            fix="pass the manifests of all shared stages in which variants differ",
        )
    chain = [cache, *(shared[digest] for digest in cache.inputs.values() if digest in shared)]
    summaries = read_json(attribute.file("summary.json"))["graphs"]
    evaluation = read_evaluation(evaluate.file("evaluation.json"))
    graphs = {one["prompt"]: read_graph(attribute.file(f"graph_data/{one['prompt']}.json")) for one in summaries}
    return Member(
        name=name,
        options={key: value for manifest in chain for key, value in _flat(manifest.config, manifest.stage).items()},
        cache=cache,
        seed=train.config["seed"],
        settings=_settings(train, evaluate, attribute),
        figures={
            "ev": evaluation.ev,
            "l0": evaluation.l0,
            "kl": evaluation.replacement.kl,
            "replacement_score": _mean(one["replacement_score"] for one in summaries),
        },
        prompts={prompt: document["metadata"]["prompt"] for prompt, document in graphs.items()},
        nodes={
            prompt: frozenset((node["layer"], node["feature"], node["pos"]) for node in graph_features(document))
            for prompt, document in graphs.items()
        },
        model=train.folder / "model",
        digest=digest_of([manifest.digest for manifest in (*chain, train, evaluate, attribute)]),
    )


def _belonging(name: str, stages: Mapping[str, Manifest | None]) -> list[Manifest]:
    """The manifests of one variant, if all are there and made from its transcoder."""
    train = stages["train"]
    for stage, manifest in stages.items():
        if train is None or manifest is None or (stage != "train" and manifest.inputs.get("train") != train.digest):
            raise UpstreamError(
                f"the manifest of stage {stage} of variant {name}, made from its transcoder",
                found="none" if manifest is None else "one made from another transcoder",
                where="--study",
                fix=f"run stage {stage} again, and pass {', '.join(PER_VARIANT)} of every variant",
            )
    return [manifest for manifest in stages.values() if manifest is not None]


def _settings(*manifests: Manifest) -> str:
    """The configurations without seed and model; the model differs only where shared stages do."""
    configs = [{key: value for key, value in one.config.items() if key not in ("seed", "model")} for one in manifests]
    return json.dumps(configs, sort_keys=True)


def _flat(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted keys. The model, of which every stage has a copy, goes by its own name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = key if key == "model" else f"{prefix}.{key}"
        flat |= _flat(value, dotted) if isinstance(value, Mapping) and value else {dotted: value}
    return flat


def differing(members: Sequence[Member]) -> list[str]:
    """The keys in which members differ; what stage calibrate was told as stage cache was, once."""
    keys = dict.fromkeys(key for member in members for key in member.options)
    found = [key for key in keys if any(one.options.get(key) != members[0].options.get(key) for one in members)]
    twins = {key: key.replace("calibrate.", "cache.", 1) for key in found if key.startswith("calibrate.")}
    told_twice = [
        key
        for key, twin in twins.items()
        if twin in found and all(one.options.get(key) == one.options.get(twin) for one in members)
    ]
    return [key for key in found if key not in told_twice]


def _groups(members: Sequence[Member], keys: Sequence[str]) -> dict[str, list[Member]]:
    """Members by what they differ in, under a name made of it, in order of appearance."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        values = [member.options.get(key) for key in keys]
        words = [f"{key.rpartition('.')[2]} {value}" for key, value in zip(keys, values, strict=True)]
        groups.setdefault(str(values[0]) if len(keys) == 1 else ", ".join(words), []).append(member)
    return groups


def _baseline(groups: Mapping[str, Sequence[Member]]) -> str:
    for codec in EXACT:
        for name, members in groups.items():
            if members[0].options.get("cache.codec") == codec:
                return name
    return next(iter(groups))


def _difference(figure: str, members: Sequence[Member], base: Sequence[Member]) -> dict[str, Any] | None:
    """Difference of one figure: paired if both groups have the same runs but for the shared stages, else Welch.

    None if the figure is undefined for one of them.
    """
    values, others = ([one.figures[figure] for one in group] for group in (members, base))
    here, there = [value for value in values if value is not None], [value for value in others if value is not None]
    if len(here) < len(values) or len(there) < len(others):
        return None
    runs, twins = ([(one.settings, one.seed) for one in group] for group in (members, base))
    if sorted(runs) == sorted(twins) and len(set(runs)) == len(runs):
        found, method = statistics.paired_difference(here, [there[twins.index(run)] for run in runs]), "paired"
    else:
        found, method = statistics.welch_difference(here, there), "welch"
    return {**_plain(found), "method": method}


def _plain(estimate: statistics.Estimate) -> dict[str, Any]:
    return {key: rounded(value) if isinstance(value, float) else value for key, value in asdict(estimate).items()}


def jaccard(common: int, left: int, right: int) -> float | None:
    """Share of all nodes of two graphs that both have; None if there are none.

    >>> jaccard(2, 3, 3), jaccard(0, 0, 0)
    (0.5, None)
    """
    union = left + right - common
    return common / union if union else None


def _mean(values: Iterable[Real | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def common_prompts(members: Sequence[Member]) -> list[str]:
    """Prompts that all members with graphs traced, with the same text."""
    traced = [one.prompts for one in members if one.prompts]
    return [name for name, text in (traced or [{}])[0].items() if all(one.get(name) == text for one in traced)]


def overlap_by_id(pair: Pair, prompts: Sequence[str]) -> float | None:
    """Mean Jaccard overlap of feature nodes with the same layer, feature and position."""
    left, right = (member.nodes for member in pair)
    return _mean(jaccard(len(left[one] & right[one]), len(left[one]), len(right[one])) for one in prompts)


def overlap_matched(pair: Pair, prompts: Sequence[str]) -> float | None:
    """Mean Jaccard overlap of feature nodes after features were matched by what they write."""
    left, right = pair
    wanted: dict[int, set[int]] = {}
    for prompt in prompts:
        for layer, feature, _ in left.nodes[prompt]:
            wanted.setdefault(layer, set()).add(feature)
    partner: dict[tuple[int, int], int] = {}
    for layer, features in wanted.items():
        decoders = [read_decoder(member.model, layer).flatten(start_dim=1) for member in pair]
        found = mutual_matches(*decoders, wanted=sorted(features))
        partner |= {(layer, feature): other for feature, other in found.items()}
    overlaps = []
    for prompt in prompts:
        here, there = left.nodes[prompt], right.nodes[prompt]
        common = sum((layer, partner.get((layer, feature)), pos) in there for layer, feature, pos in here)
        overlaps.append(jaccard(common, len(here), len(there)))
    return _mean(overlaps)


def _overlaps(kinds: Mapping[str, tuple[Sequence[Pair], Any]], prompts: Sequence[str]) -> dict[str, Any]:
    """Kind -> mean overlap over pairs of runs that both have graphs; None where there is no pair or no node."""
    found = {}
    for kind, (pairs, measure) in kinds.items():
        traced = [pair for pair in pairs if all(one.prompts for one in pair)]
        values = [value for value in (measure(pair, prompts) for pair in traced) if value is not None]
        found[kind] = {"mean": rounded(sum(values) / len(values)), "pairs": len(values)} if values else None
    return found


def _cache_bytes(cache: Manifest) -> int:
    return sum(entry["bytes"] for job in (cache, *unit_manifests(cache)) for entry in job.files.values())


def study_document(members: Sequence[Member]) -> dict[str, Any]:
    """The study as plain data; docs/stages/report.md says what is in it.

    Raises:
        UpstreamError: the members do not differ in a shared stage.
    """
    keys = differing(members)
    if not keys:
        raise UpstreamError(
            "variants whose shared stages differ",
            found=f"{len(members)} that do not",
            where="--study",
            fix="leave --study out, or pass the manifests of the shared stages in which they differ",
        )
    groups, prompts = _groups(members, keys), common_prompts(members)
    baseline = _baseline(groups)
    base = groups[baseline]
    alike = [pair for pair in combinations(base, 2) if _other_seed(pair)]
    reference = _overlaps({"by_id": (alike, overlap_by_id), "matched": (alike, overlap_matched)}, prompts)
    reference["matched_other_seed"] = reference["matched"]
    rows = []
    for name, group in groups.items():
        same = [pair for pair in product(group, base) if pair[0].settings == pair[1].settings and not _other_seed(pair)]
        other = [pair for pair in product(group, base) if _other_seed(pair)]
        overlaps = reference
        if name != baseline:
            kinds = {
                "by_id": (same, overlap_by_id),
                "matched": (same, overlap_matched),
                "matched_other_seed": (other, overlap_matched),
            }
            overlaps = _overlaps(kinds, prompts)
        rows.append(
            {
                "name": name,
                "options": {key: group[0].options.get(key) for key in keys},
                "variants": [member.name for member in group],
                "cache_bytes": _cache_bytes(group[0].cache),
                "means": {key: _rounded(_mean(one.figures[key] for one in group)) for key in FIGURES},
                "differences": None if name == baseline else {key: _difference(key, group, base) for key in FIGURES},
                "overlaps": overlaps,
                "no_lower": None if name == baseline else _no_lower(overlaps, reference),
            }
        )
    return {
        "keys": keys,
        "baseline": baseline,
        "confidence": statistics.CONFIDENCE,
        "prompts": prompts,
        "groups": rows,
    }


def _other_seed(pair: Pair) -> bool:
    return pair[0].settings == pair[1].settings and pair[0].seed != pair[1].seed


def _rounded(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _no_lower(overlaps: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, bool | None]:
    """Whether a group's graphs are no further from the baseline's than those of two seeds of the baseline are."""
    return {
        kind: None if one is None or reference[kind] is None else one["mean"] >= reference[kind]["mean"]
        for kind, one in overlaps.items()
    }
