"""What Labelbox's own SDK makes of import rows: run in .venv-labelbox, prints JSON.

python labelbox_client.py ROWS.ndjson
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from labelbox.data.serialization.ndjson.label import NDLabel
from labelbox.types import Mask, Point, Polygon, Radio, Rectangle

lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
annotations = [NDLabel(annotations=json.loads(line)).annotations for line in lines]


def value(read: Any) -> Any:
    """The SDK's own type for what is annotated, as plain numbers; masks as lists of rows."""
    if isinstance(read, Radio):
        return [read.answer.name, read.answer.confidence]
    if isinstance(read, Rectangle):
        return [read.start.x, read.start.y, read.end.x, read.end.y]
    if isinstance(read, Polygon):
        return [[point.x, point.y] for point in read.points]
    if isinstance(read, Point):
        return [read.x, read.y]
    assert isinstance(read, Mask)
    return np.all(read.mask.value == read.color, axis=-1).tolist()


seen = []
for each in annotations:
    # A radio's annotation converts itself and its data row; a tool's only what it is of.
    common = each.to_common()
    read = common[0].value if isinstance(common, list) else getattr(common, "value", common)
    seen.append(
        {
            "read_as": type(each).__name__,
            "is": type(read).__name__,
            "name": each.name,
            "uuid": str(each.uuid),
            "key": each.data_row.global_key,
            "confidence": getattr(each, "confidence", None),
            "value": value(read),
            "again": each.model_dump(exclude_none=True, by_alias=True),
        }
    )
json.dump(seen, sys.stdout)
