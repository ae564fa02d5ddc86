"""Options of stage `report`: how much of a run goes onto its page."""

from dataclasses import dataclass

from circuitmill.errors import ConfigError


@dataclass(frozen=True)
class ReportConfig:
    """What the page holds."""

    feature_pages: int
    """Most features with a page of their own: those in graphs first (always all), then the most active ones."""
    chunk_features: int
    """Features per data file; a page loads the file of the feature it shows, about 5 kB a feature."""
    top_windows: int
    """Strongest windows on a feature's page."""
    quantile_windows: int
    """Windows per activation quantile on a feature's page."""

    def __post_init__(self) -> None:
        for key, least in (("feature_pages", 0), ("chunk_features", 1), ("top_windows", 1), ("quantile_windows", 0)):
            if getattr(self, key) < least:
                raise ConfigError(
                    f"at least {least}", found=getattr(self, key), where=f"report.{key}", fix="correct the value"
                )
