"""What a run showed: localisation of errors, figures and the HTML reports."""

from sdzero_jax.analysis.comparison import stopped_label, write_comparison
from sdzero_jax.analysis.folders import write_reports
from sdzero_jax.analysis.localisation import (
    around_first_error,
    auroc,
    buckets,
    concentration,
    localisation_summary,
    top_hit_rate,
)
from sdzero_jax.analysis.report import write_report

__all__ = [
    "around_first_error",
    "auroc",
    "buckets",
    "concentration",
    "localisation_summary",
    "stopped_label",
    "top_hit_rate",
    "write_comparison",
    "write_report",
    "write_reports",
]
