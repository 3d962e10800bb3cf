# SPDX-License-Identifier: Apache-2.0
"""Reads the version from the bundle's metadata, the one place that holds it; all else is in pyproject.toml."""

import json
from pathlib import Path

from setuptools import setup

setup(
    version=json.loads(Path(__file__).with_name("bundle").joinpath("configs", "metadata.json").read_text())["version"]
)
