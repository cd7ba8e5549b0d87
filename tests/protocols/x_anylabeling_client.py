"""What X-AnyLabeling's own client class gets: run in .venv-x-anylabeling, prints JSON.

python x_anylabeling_client.py URL PICTURE.png WORKING_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anylabeling.config
from PyQt6.QtGui import QImage
from PyQt6.QtWidgets import QApplication

PICTURE, FOLDER = Path(sys.argv[2]), Path(sys.argv[3])
application = QApplication(["x_anylabeling_client", "-platform", "offscreen"])
anylabeling.config.set_work_directory(str(FOLDER))
settings = FOLDER / "settings.yaml"
settings.write_text(json.dumps({"remote_server_settings": {"server_url": sys.argv[1]}}))
anylabeling.config.current_config_file = str(settings)

# It reads the settings where it is imported.
from anylabeling.services.auto_labeling.remote_server import RemoteServer  # noqa: E402

complaints: list[str] = []
client = RemoteServer(
    {"type": "remote_server", "name": "camserve", "display_name": "camserve"}, complaints.append
)


def shapes() -> dict[str, Any]:
    """What the program would draw."""
    result = client.predict_shapes(QImage(str(PICTURE)), str(PICTURE))
    return {
        "description": result.description,
        "replace": result.replace,
        "shapes": [
            {
                "label": shape.label,
                "type": shape.shape_type,
                "score": shape.score,
                "group": shape.group_id,
                "points": [[point.x(), point.y()] for point in shape.points],
            }
            for shape in result.shapes
        ],
    }


models = client.get_available_models()
client.set_auto_labeling_conf(0.5)
tasks: dict[str, dict[str, Any]] = {}
for name, model in models.items():
    client.set_model_id(name)
    tasks[name] = {}
    for task in model["available_tasks"]:
        client.set_task(task["id"])
        tasks[name][task["id"]] = shapes()
seen: dict[str, Any] = {"models": models, "tasks": tasks}
if "small" in models:
    client.set_model_id("small")
    client.set_task("cam_polygon")
    client.set_mask_fineness(0.01)
    seen["coarse"] = shapes()
    client.set_auto_labeling_preserve_existing_annotations_state(state=True)
    client.set_auto_labeling_filter_classes(["class 0"])
    seen["filtered"] = shapes()
    client.set_model_id("absent")
    seen["refused"] = shapes()
json.dump(seen | {"complaints": complaints}, sys.stdout)
