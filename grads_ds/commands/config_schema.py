"""`grads-ds config --schema`: the JSON schema of the configuration file, by which editors complete
and check its keys.

Writes to standard output; reads nothing. In an editor with the YAML language server, save it and
put `# yaml-language-server: $schema=PATH` on the first line of a configuration.
"""

from __future__ import annotations

import argparse
import json


def add(command: argparse.ArgumentParser) -> None:
    """Declare `config`."""
    command.add_argument(
        "--schema", action="store_true", required=True, help="print the JSON schema (draft 2020-12)"
    )
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print the schema; exit status 0."""
    from grads_ds.config.config import Config

    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(draft | Config.model_json_schema(), indent=1, ensure_ascii=False))
    return 0
