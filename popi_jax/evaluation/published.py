"""The accuracies that papers report, as fields of a row beside the measured one. They are never a measurement."""

import json
import pathlib

from popi_jax.config import Config

FIELDS = ("published_accuracy", "published_source")
# By data set (alignx by its variant, too) and method: accuracy in percent, what the reference reads, and the paper. The
# two papers define accuracy with different references, so a figure stands only beside a row with the same one.
_FILE = pathlib.Path(__file__).parents[1] / "assets/published.json"
_ABLATIONS = ("inference_only", "generator_only")  # Schedules of popi that no published figure is for.


def figures(config: Config, method: str) -> dict[str, float | str]:
    """Returns the FIELDS of a row: the paper's accuracy in percent, and the paper; {} if no paper has this row.

    Args:
        config: the row's config.
        method: the row's name in the table, such as popi.
    """
    data = config.data
    name = f"alignx/{data.variant}" if data.dataset == "alignx" else data.dataset
    found = json.loads(_FILE.read_text(encoding="utf-8")).get(name, {}).get(method)
    if found is None or found["reference_context"] != config.objective.reference_context:
        return {}
    if method == "popi" and config.schedule.name in _ABLATIONS:
        return {}
    if data.protocol != "published" or config.model.path == "stylebook":
        return {}  # Other users, or a model that knows no other words than its own.
    return dict(zip(FIELDS, (found["accuracy"], found["source"]), strict=True))
