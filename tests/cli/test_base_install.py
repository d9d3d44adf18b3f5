"""Commands in the base install: none needs an extra before it runs."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata

from pipeline.artifact.sbom import installed
from support.paths import ROOT

LOAD_ALL = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(sys.argv[1]):
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pipeline.cli.groups import Lazy
from pipeline.cli.main import main

def load(command):
    command = command.load() if isinstance(command, Lazy) else command
    for inner in getattr(command, "commands", {}).values():
        load(inner)

load(main)
"""


def test_commands_load_with_the_base_dependencies_alone():
    """`tandem vllm-cache pack` on a machine that only pulls ended in `No module named 'cyclonedx'`."""
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [requirement.partition(">=")[0] for requirement in base]
    present = {package.name for package in installed(names).values()}
    owners = metadata.packages_distributions()
    absent = sorted(module for module, of in owners.items() if not present & set(of) and module != "pipeline")
    assert {"torch", "cyclonedx", "transformers", "boto3"} <= set(absent)
    done = subprocess.run([sys.executable, "-c", LOAD_ALL, json.dumps(absent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
