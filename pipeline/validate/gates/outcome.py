"""The result of a gate: its section of the report, and its findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.validate.report.schema import Gate

SectionT = TypeVar("SectionT", covariant=True)


@dataclass(frozen=True)
class GateOutcome(Generic[SectionT]):
    """One gate: its name, its typed section of the report, and its findings; without findings it passed."""

    name: str
    section: SectionT
    findings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True without findings."""
        return not self.findings

    def verdict(self) -> Gate:
        """Return the gate as the report lists it."""
        return Gate(name=self.name, passed=self.passed, findings=self.findings)
