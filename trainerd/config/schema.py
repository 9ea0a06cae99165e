"""The JSON Schema of a configuration file, for editors. `python -m trainerd.config.schema` writes it anew; a test keeps it true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainerd.config.model import RunConfig

FILE = Path(__file__).with_name("schema.json")


def schema() -> dict[str, Any]:
    """The schema, from the model: the docstring under a field is its description."""
    document = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "title": "trainerd configuration"}


def text() -> str:
    """The schema as the file holds it."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8", newline="\n")
