"""The study on hand-made variants whose overlaps can be counted."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitmill.errors import UpstreamError
from circuitmill.stores.manifest import Manifest
from circuitmill.stores.tensors import write_tensors
from circuitmill.viz import study, study_view
from circuitmill.viz.study import Member

T2 = 4.302653
"""Student's t for 95% and two degrees of freedom."""


def cache_manifest(folder: Path, **options: Any) -> Manifest:
    return Manifest("cache", None, 1, {"mode": "stream", **options}, {}, {}, {"a": {"bytes": 1000}}, folder)


@pytest.fixture(autouse=True)
def _no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "unit_manifests", lambda manifest: [])


def write_decoders(folder: Path, *layers: torch.Tensor) -> Path:
    """A transcoder's decoders; a layer is [feature target d_model]."""
    folder.mkdir(parents=True)
    for layer, decoder in enumerate(layers):
        write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder})
    return folder


def member(folder: Path, name: str, codec: str, seed: int, places: set[study.Node], **other: Any) -> Member:
    model = folder / name
    if not model.exists():
        write_decoders(model, torch.eye(8).reshape(8, 2, 4), torch.eye(8, 4).unsqueeze(1))
    plain = {
        "options": {"cache.mode": "disk", "cache.codec": codec},
        "cache": cache_manifest(folder, codec=codec),
        "settings": "",
        "figures": {"ev": 0.9, "l0": 10, "kl": 0.1, "replacement_score": 0.5},
        "prompts": {"p": "text"},
        "nodes": {"p": frozenset(places)},
        "digest": name,
    }
    return Member(name=name, seed=seed, model=model, **(plain | other))


def figures(ev: float | None, l0: float = 10) -> dict[str, Any]:
    return {"ev": ev, "l0": l0, "kl": 0.1, "replacement_score": 0.5}


def test_figures_are_paired_by_seed(tmp_path: Path) -> None:
    base, codec = [0.90, 0.94, 0.98], [0.89, 0.92, 0.97]
    members = [member(tmp_path, f"b{s}", "bf16", s, set(), figures=figures(base[s])) for s in range(3)]
    # in another order than the baseline's
    members += [member(tmp_path, f"i{s}", "int4", s, set(), figures=figures(codec[s])) for s in (2, 0, 1)]
    document = study.study_document(members)
    bf16, int4 = document["groups"]
    found = int4["differences"]["ev"]
    half = T2 * math.sqrt(sum((d + 0.04 / 3) ** 2 for d in (-0.01, -0.02, -0.01)) / 2 / 3)
    assert (found["mean"], found["method"], found["n"]) == (pytest.approx(-0.04 / 3, rel=1e-5), "paired", 3)
    assert (found["low"], found["high"]) == pytest.approx((-0.04 / 3 - half, -0.04 / 3 + half), rel=1e-4)
    assert int4["means"]["ev"] == pytest.approx(2.78 / 3, rel=1e-5) and bf16["differences"] is None


def test_runs_that_do_not_pair_are_compared_by_welch(tmp_path: Path) -> None:
    members = [member(tmp_path, f"b{s}", "bf16", s, set(), figures=figures(v)) for s, v in enumerate((0.9, 0.94))]
    members += [member(tmp_path, f"i{s}", "int4", s, set(), figures=figures(v)) for s, v in ((5, 0.8), (6, 0.86))]
    [_, int4] = study.study_document(members)["groups"]
    assert int4["differences"]["ev"]["method"] == "welch"
    assert int4["differences"]["ev"]["mean"] == pytest.approx(-0.09)
    # nothing to compare node by node, and no seed of the one that is missing in the other
    assert int4["overlaps"]["by_id"] is None and int4["no_lower"]["by_id"] is None


def test_the_same_seed_of_other_settings_is_no_pair(tmp_path: Path) -> None:
    members = [member(tmp_path, f"b{x}", "bf16", 0, {(0, 0, 1)}, settings=x, figures=figures(0.9)) for x in "xy"]
    members += [member(tmp_path, f"i{x}", "int4", 0, {(0, 0, 1)}, settings=x, figures=figures(0.8)) for x in "yx"]
    [bf16, int4] = study.study_document(members)["groups"]
    assert (int4["differences"]["ev"]["method"], int4["differences"]["ev"]["n"]) == ("paired", 2)
    assert int4["overlaps"]["by_id"]["pairs"] == 2
    # two settings are not two seeds
    assert bf16["overlaps"]["by_id"] is None and int4["no_lower"]["by_id"] is None


def test_an_undefined_figure_has_no_difference(tmp_path: Path) -> None:
    members = [member(tmp_path, "b", "bf16", 0, set(), figures=figures(None)), member(tmp_path, "i", "int4", 0, set())]
    [bf16, int4] = study.study_document(members)["groups"]
    assert bf16["means"]["ev"] is None and int4["differences"]["ev"] is None
    assert int4["differences"]["l0"] == {"mean": 0.0, "low": None, "high": None, "n": 1, "method": "paired"}
    assert study_view.rows(study.study_document(members))[1][3:5] == [("–", ""), ("0", "")]


def test_what_calibrate_was_told_as_cache_was_counts_once(tmp_path: Path) -> None:
    def one(name: str, **options: str) -> Member:
        return member(tmp_path, name, "bf16", 0, set(), options=options)

    keys = {"cache.hookpoint": "mlp", "calibrate.hookpoint": "mlp", "calibrate.tokens": "1"}
    a, b = one("a", **keys), one("b", **dict.fromkeys(keys, "2"))
    assert study.differing([a, b]) == ["cache.hookpoint", "calibrate.tokens"]
    c = one("c", **(keys | {"calibrate.hookpoint": "2"}))
    assert study.differing([a, c]) == ["calibrate.hookpoint"]
    assert study.differing([a, b, c]) == ["cache.hookpoint", "calibrate.hookpoint", "calibrate.tokens"]


def test_variants_without_graphs_share_no_prompts_and_take_none_away(tmp_path: Path) -> None:
    a = member(tmp_path, "a", "bf16", 0, {(0, 1, 2)})
    b = replace(member(tmp_path, "b", "int4", 0, {(0, 1, 2)}), prompts={}, nodes={})
    assert study.common_prompts([b, a]) == ["p"] and study.common_prompts([b, b]) == []
    document = study.study_document([a, b])
    assert document["groups"][1]["overlaps"]["by_id"] is None
    assert "graphs, against the baseline" in study_view.notes(document)[1]
    alone = study_view.notes(document | {"prompts": []})
    assert alone[1].startswith("No graphs are compared")


def test_overlap_by_id_is_the_mean_over_prompts(tmp_path: Path) -> None:
    texts = {"p": "text", "q": "more", "odd": "one"}
    left = {"p": frozenset({(0, 1, 1), (0, 2, 1), (1, 3, 4)}), "q": frozenset({(0, 1, 1)}), "odd": frozenset()}
    right = {"p": frozenset({(0, 1, 1), (0, 2, 2), (1, 3, 4)}), "q": frozenset({(1, 1, 1)}), "odd": frozenset()}
    a = member(tmp_path, "a", "bf16", 0, set(), nodes=left, prompts=texts)
    b = member(tmp_path, "b", "int4", 0, set(), nodes=right, prompts=texts | {"odd": "other"})
    assert study.common_prompts([a, b]) == ["p", "q"]
    assert study.overlap_by_id((a, b), ["p", "q"]) == pytest.approx((2 / 4 + 0) / 2)
    # a graph without a feature says nothing
    assert study.overlap_by_id((a, b), ["p", "q", "odd"]) == pytest.approx((2 / 4 + 0) / 2)


def test_matched_overlap_does_not_depend_on_the_numbers_of_features(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    decoders = [torch.randn(8, 2, 16, generator=generator), torch.randn(8, 1, 16, generator=generator)]
    orders = [torch.randperm(8, generator=generator), torch.randperm(8, generator=generator)]
    write_decoders(tmp_path / "a", *decoders)
    write_decoders(tmp_path / "b", *(d[order] for d, order in zip(decoders, orders, strict=True)))
    number = [{int(feature): place for place, feature in enumerate(order)} for order in orders]
    here = {(0, 1, 3), (0, 2, 3), (0, 2, 5), (1, 7, 5)}
    there = {(layer, number[layer][feature], pos) for layer, feature, pos in here - {(0, 2, 5)}}
    there.add((1, number[1][6], 5))
    a, b = member(tmp_path, "a", "bf16", 0, here), member(tmp_path, "b", "int4", 1, there)
    assert study.overlap_matched((a, b), ["p"]) == pytest.approx(3 / 5)
    assert study.overlap_matched((b, a), ["p"]) == pytest.approx(3 / 5)
    assert study.overlap_by_id((a, b), ["p"]) < 3 / 5


def test_a_matched_feature_at_another_position_is_another_node(tmp_path: Path) -> None:
    a, b = member(tmp_path, "a", "bf16", 0, {(0, 1, 3)}), member(tmp_path, "b", "int4", 0, {(0, 1, 4)})
    assert study.overlap_matched((a, b), ["p"]) == 0.0


def test_overlaps_are_held_against_those_of_two_seeds(tmp_path: Path) -> None:
    nodes = {0: {(0, 0, 1), (0, 1, 1), (0, 2, 1)}, 1: {(0, 0, 1), (0, 1, 1), (0, 3, 1)}}
    members = [member(tmp_path, f"bf16-{s}", "bf16", s, nodes[s]) for s in (0, 1)]
    members += [member(tmp_path, f"int8-{s}", "int8", s, nodes[s]) for s in (0, 1)]
    members += [member(tmp_path, f"int2-{s}", "int2", s, {(0, 0, 1), (1, 0, 1)}) for s in (0, 1)]
    bf16, int8, int2 = study.study_document(members)["groups"]
    # both dictionaries here have the same features, so numbers and matches agree
    assert bf16["overlaps"]["by_id"] == bf16["overlaps"]["matched"] == {"mean": 0.5, "pairs": 1}
    assert int8["overlaps"]["by_id"] == {"mean": 1.0, "pairs": 2}
    assert int8["overlaps"]["matched_other_seed"] == {"mean": 0.5, "pairs": 2}
    assert int8["no_lower"] == {"by_id": True, "matched": True, "matched_other_seed": True}
    assert int2["overlaps"]["by_id"] == {"mean": 0.25, "pairs": 2}
    assert int2["no_lower"] == {"by_id": False, "matched": False, "matched_other_seed": False}


def test_the_baseline_is_the_most_exact_codec_else_the_first(tmp_path: Path) -> None:
    def baseline(*codecs: str) -> str:
        return study.study_document([member(tmp_path, codec, codec, 0, set()) for codec in codecs])["baseline"]

    assert baseline("int8", "bf16", "int4") == "bf16"
    assert baseline("bf16", "float32") == "float32"
    assert baseline("int8", "int4") == "int8"


def test_groups_are_named_after_all_they_differ_in(tmp_path: Path) -> None:
    options = [
        {"cache.codec": codec, "cache.bits": bits, "cache.mode": "disk"}
        for codec, bits in (("int8", 4), ("entropy", 3))
    ]
    members = [member(tmp_path, f"m{place}", "", 0, set(), options=one) for place, one in enumerate(options)]
    document = study.study_document(members)
    assert document["keys"] == ["cache.codec", "cache.bits"]
    assert [group["name"] for group in document["groups"]] == ["codec int8, bits 4", "codec entropy, bits 3"]
    assert document["groups"][1]["options"] == {"cache.codec": "entropy", "cache.bits": 3}
    with pytest.raises(UpstreamError, match="variants whose shared stages differ"):
        study.study_document([members[0], replace(members[0], name="other")])


def test_the_model_goes_by_its_own_name() -> None:
    config = {"model": {"dtype": "float32"}, "codec": "int8", "none": {}}
    assert study._flat(config, "cache") == {"model.dtype": "float32", "cache.codec": "int8", "cache.none": {}}


def test_text_is_a_table_whose_columns_line_up(tmp_path: Path) -> None:
    members = [member(tmp_path, f"{codec}-{s}", codec, s, {(0, s, 1)}) for codec in ("bf16", "int4") for s in (0, 1)]
    lines = study_view.text(study.study_document(members)).splitlines()
    assert lines[0] == "Study: cache.codec"
    head, base, int4 = lines[1:4]
    assert len(head) == len(base) == len(int4)
    assert "bf16 (baseline)" in base and int4.startswith("  int4 ") and "1 ✓" in int4
    assert head.index("Replacement score") + len("Replacement score") == base.index("0.5 ") + 3
