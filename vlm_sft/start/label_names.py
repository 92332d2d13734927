"""Names of classes that rows hold as numbers: `datasets` keeps them beside its rows (`ClassLabel`)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..base.names import Values
from ..base.whole_files import check_regular, read_text
from ..reading.locations import is_hub_id

Names = dict[str, list[str]]


def label_names(source: str | Path) -> Names:
    """Column → names of its classes by number, as a parquet file, a saved data set or one of the Hub says them."""
    features: Any = None
    path = Path(source)
    with suppress(Exception):  # what is no such file, or a damaged one, is said where its rows are read
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            check_regular(path)
            features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
        elif path.is_dir():
            infos = [*path.glob("dataset_info.json"), *path.glob("train/dataset_info.json")]
            features = json.loads(read_text(infos[0]))["features"]
        elif isinstance(source, str) and source.count("/") == 1 and is_hub_id(source):
            import datasets

            features = datasets.load_dataset_builder(source).info.features.to_dict()
    if not isinstance(features, dict):
        return {}
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    return {
        name: [str(each) for each in kind["names"]]
        for name, kind in kinds.items()
        if kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)
    }


def with_names(row: Values, names: Names) -> Values:
    """A row with the names of its classes in place of their numbers."""

    def named(key: str, value: object) -> Any:
        known = names.get(key)
        return known[value] if known and isinstance(value, int) and 0 <= value < len(known) else value

    return {key: named(key, value) for key, value in row.items()} if names else row
