"""What all scenarios of a session share: the template, results of undisturbed commands, the journal."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos import server
from chaos.operations import OPERATIONS, Operation, add_build, make_template
from chaos.scenario import Case, Scenario, play
from chaos.world import World
from support.paths import ROOT

OUT = ROOT / "build/chaos"
JOURNAL = OUT / "journal.jsonl"


@dataclass
class Ground:
    """The templates, one with a recipe and its cache; what an undisturbed command gives, by commands in order."""

    folder: Path
    results: dict[tuple[str, ...], tuple[object, int]] = field(default_factory=dict)
    templates: dict[bool, Path] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    def template(self, with_build: bool) -> Path:
        """Return a template, made once."""
        if with_build not in self.templates:
            root = self.folder / f"template-{'build' if with_build else 'registry'}"
            root.mkdir()
            make_template(root)
            if with_build:
                OUT.mkdir(parents=True, exist_ok=True)
                add_build(root, OUT / "cache")
            self.templates[with_build] = root
        return self.templates[with_build]

    def world(self, operation: Operation) -> World:
        """Return a copy of the template, always at one path: locks of recipes and registries contain paths."""
        home = self.folder / "run"
        shutil.rmtree(home, ignore_errors=True)
        (home / "control").mkdir(parents=True)
        shutil.copytree(self.template(operation.needs_build), home / "world", symlinks=True)
        return World(home / "world", home / "control")

    def undisturbed(self, last: Operation, *names: str) -> tuple[object, int]:
        """Return the result of `last` after commands that ran undisturbed, and the number of its steps."""
        key = (last.name, *names)
        if key not in self.results:
            world = self.world(last)
            steps = 0
            for name in names:
                done = world.run(OPERATIONS[name].command)
                assert done.status == 0, f"{name}, undisturbed: {done.said}"
                steps = done.steps if name == last.name else steps
            self.results[key] = last.result(world), steps
        return self.results[key]

    def requests(self, operation: Operation) -> int:
        """Return the number of requests of an undisturbed command whose registry is on a server."""
        if operation.name not in self.counted:
            world = self.world(operation)
            with server.running(world.root) as proxy:
                world.environ.update(server.environ(proxy.endpoint))
                done = world.run(server.command(operation.command, world))
                assert done.status == 0, f"{operation.name} on a server, undisturbed: {done.said}"
                self.counted[operation.name] = len(proxy.log)
        return self.counted[operation.name]

    def play(self, scenario: Scenario, step: int | None = None) -> int:
        """Play a scenario; returns the step of the disturbance."""
        own = scenario.operation
        result, steps = self.undisturbed(own, own.name)
        expected = [result]
        if scenario.disturbance == "stop":
            orders = ((own.name, scenario.rival), (scenario.rival, own.name))
            expected = [self.undisturbed(own, *names)[0] for names in orders]
        if scenario.disturbance.startswith("server-"):
            steps = self.requests(own)
        step = step or 1 + int(scenario.at * steps)
        play(Case(scenario, self.world(own), step, tuple(expected)))
        return step


def passed(source: str) -> set[int]:
    """Return the seeds that passed with this source."""
    if not JOURNAL.is_file():
        return set()
    lines = map(json.loads, JOURNAL.read_text().splitlines())
    return {line["seed"] for line in lines if line["verdict"] == "passed" and line["source"] == source}


def note(scenario: Scenario, source: str, verdict: str, started: float) -> None:
    """Write a line to the journal."""
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "seed": scenario.seed, "scenario": str(scenario), "verdict": verdict, "source": source,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    with JOURNAL.open("a") as file:
        file.write(json.dumps(line) + "\n")
