"""A finished run without data: manifests of all its jobs, and what each took."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from circuitmill.config.run import Run
from circuitmill.pipeline import STAGES
from circuitmill.stages.cost import settings_of
from circuitmill.stages.cost_work import Setting
from circuitmill.stores.manifest import Manifest, StageOutput, load_manifest

GPU = "NVIDIA H200"
ON_GPU = ("calibrate", "cache", "train", "evaluate", "features", "attribute")
SECONDS = {
    "toyworld": 90.0,
    "tokenize": 70.0,
    "calibrate": 20.0,
    "cache": 50.0,
    "train": 4000.0,
    "evaluate": 120.0,
    "features": 80.0,
    "interpret": 60.0,
    "attribute": 40.0,
}
GATHER = 2.5
FEW_JOBS = ["cache.train_shards=20", "cache.heldout_shards=2", "features.blocks=4"]
"""For runs with many: 22 shards and 4 blocks."""


@dataclass
class Finished:
    """Makes it."""

    run: Run
    folder: Path
    gpu: bool = True
    ranks: int = 4
    tokens_per_second: float = 100_000.0
    l0: float = 20.0
    few: int = 12
    """Layers of the training that work with active features alone."""
    made: dict[tuple[str, str], Manifest] = field(default_factory=dict)

    def make(self, *stages: str) -> "Finished":
        """All jobs of these stages, of all variants; earlier ones must be there."""
        for row in STAGES:
            if row.name not in stages or row.name not in self.run.stages:
                continue
            for home, cfg in self.run.stages[row.name].items():
                folder = self.folder / home / row.name if home else self.folder / row.name
                variant = home or self.run.variants[0]
                inputs = {
                    name: self.made[name, self.run.home(name, variant)]
                    for name in row.upstream
                    if name in self.run.stages
                }
                units = cfg.units() if row.unit else ()
                for index, unit in enumerate(units):
                    self._finish(row.name, cfg, inputs, folder / str(row.unit) / unit, unit, variant, index)
                self.made[row.name, home] = self._finish(row.name, cfg, inputs, folder, None, variant, 0)
        return self

    def all(self) -> "Finished":
        """All stages."""
        return self.make(*(row.name for row in STAGES))

    def _finish(
        self, stage: str, cfg: object, inputs: dict, folder: Path, unit: str | None, variant: str, index: int
    ) -> Manifest:
        keep = ("shard", "block", "prompt")
        output = StageOutput(stage, cfg, inputs, folder, unit=unit, keep=keep, volatile=("throughput.jsonl",))
        if stage == "train":
            self._metrics(folder, cfg)
        manifest = output.finish(self._counts(stage, variant))
        gathers = stage in ("cache", "features", "interpret", "attribute") and unit is None
        # units differ, as they do
        seconds = GATHER if gathers else SECONDS.get(stage, 5.0) + index % 3
        on_gpu = self.gpu and stage in ON_GPU and not gathers
        self.note(folder, seconds=seconds, device=GPU if on_gpu else "cpu", ranks=self.ranks if stage == "train" else 1)
        return load_manifest(manifest.folder / "manifest.json")

    def note(self, folder: Path, *, seconds: float, device: str, ranks: int = 1, continued: bool = False) -> None:
        """Say what a job took."""
        timing = {"wall_seconds": seconds, "peak_memory_bytes": 1, "device": device, "ranks": ranks}
        (folder / "timing.json").write_text(json.dumps({**timing, "continued": continued}))

    @cached_property
    def _settings(self) -> dict[str, Setting]:
        return settings_of(self.run, Path("nobody has run this"))

    def _counts(self, stage: str, variant: str) -> dict:
        setting = self._settings[variant]
        if stage == "tokenize":
            return {"sequences": dict(setting.sequences)}
        if stage in ("calibrate", "cache"):
            return {"n_layers": setting.places[0], "d_model": setting.places[1]}
        if stage == "train":
            cfg = setting.configs["train"]
            return {"tokens": cfg.steps * cfg.batch_tokens}
        return {}

    def _metrics(self, folder: Path, cfg: object) -> None:
        rows = [
            {"step": step, "tokens": step * 1000, "l0": [self.l0] * 12, "sparse_layers": self.few} for step in (1, 2, 3)
        ]
        speeds = [None, self.tokens_per_second, self.tokens_per_second]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "throughput.jsonl").write_text(
            "".join(
                json.dumps({"step": row["step"], "tokens_per_second": speed}) + "\n"
                for row, speed in zip(rows, speeds, strict=True)
            )
        )
