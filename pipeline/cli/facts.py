"""Facts of an artifact and differences of two, as fields and rows for people. Pure: reads manifests, prints nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact.manifest import PULLED, Manifest, PairManifest, content_digest
from pipeline.artifact.pulled import PullRecord
from pipeline.artifact.signer import Signer
from pipeline.artifact.signing import has_signature
from pipeline.cli.tables import Cell, Table, Verdict
from pipeline.cli.words import counted, moment, number, size, value
from pipeline.models.generation import GenerationDefaults, not_applied_warning
from pipeline.registry.card import facts
from pipeline.stores.promotions import Promotion

if TYPE_CHECKING:  # for an annotation only: this module imports torch
    from pipeline.graphs.arguments import Choice

EMPTY: Mapping[str, Cell] = {}
BYTES = {"size", "size_bytes"}
SPEEDS, SPEED = "validation.speed.", "validation.speed.speculative.tokens_per_s"
GATES = {True: "gates passed", False: "gates FAILED", None: "not validated"}


def fields_of(
    manifest: Manifest, root: Path, defaults: GenerationDefaults | None, pulled: Mapping[str, Cell] = EMPTY,
    *, has_signature: bool,
) -> dict[str, Cell]:  # fmt: skip
    """Return the contents and requirements of an artifact, by the labels of `tandem inspect`."""
    own = _pair(manifest) if isinstance(manifest, PairManifest) else _other(manifest)
    if defaults is not None and isinstance(manifest, PairManifest):
        own |= _defaults(manifest, defaults)
    return {
        "artifact": f"{manifest.name} {manifest.version}",
        "digest": content_digest(manifest),
        "path": str(root),
        "built": f"{moment(manifest.created)} UTC",
        **pulled,
        "signature": f"present, not checked; to check: {_verify(root)}" if has_signature else "not signed",
        "runs on": value(manifest.requires),
        "toolchain": value(manifest.toolchain),
        "ranks": str(manifest.ranks),
        **own,
        "files": f"{len(manifest.files)}, {size(manifest.size_bytes)}",
        **_gates(manifest),
    }


def pulled_fields(record: PullRecord | str | None) -> dict[str, Cell]:
    """Return where an artifact was pulled from, and who copied its release there; a text: why that is unknown."""
    if record is None:
        return {}
    if isinstance(record, str):
        return {"pulled from": Verdict(record, good=False)}
    alias = "" if record.reference.endswith(f"@{record.version}") else f" (release {record.version})"
    steps = {}
    for step, each in enumerate(record.promotions, start=1):
        label = "promoted" if len(record.promotions) == 1 else f"promoted {step}"
        run = f", {each.run}" if each.run else ""
        steps[label] = f"from {each.source} to {each.destination} by {each.who}, {moment(each.when)} UTC{run}"
    return {"pulled from": f"{record.reference}{alias}", **steps}


def copied_words(copies: Sequence[Promotion]) -> str:
    """Return where the last copy of a release came from, who made it and when; empty without a copy."""
    if not copies:
        return ""
    last = copies[-1]
    return f"{last.source.rpartition('/')[0]} by {last.who}, {moment(last.when)}"


def _verify(root: Path) -> str:
    return f"tandem verify {shlex.quote(str(root))} --require-signature KEY"


def signature_words(signer: Signer | str | None, *, present: bool) -> str:
    """Return the state of an artifact's signature: its signer only after a check."""
    if signer is not None:
        return f"signed by {signer}"
    return "signature not checked (--require-signature)" if present else "not signed"


def unchecked_warning(manifest: Manifest, root: Path, *, checked: bool) -> str | None:
    """Return a warning about a pulled artifact without a check of its signature; None for one that was built here."""
    if checked or not (root / PULLED).is_file():
        return None
    state = "its signature was not checked" if has_signature(root) else "it is not signed"
    what = f"{manifest.name} {manifest.version} was pulled and runs native code, and {state}"
    return f"warning: {what}: `--policy FILE` requires a signature"


def signature_state(signer: Signer | str | None, *, present: bool) -> str:
    """Return the state of a signature as a word for JSON: `accepted`, `not checked` or `none`."""
    if signer is not None:
        return "accepted"
    return "not checked" if present else "none"


def _other(manifest: Manifest) -> dict[str, Cell]:
    return {label: value(each) for label, each in facts(manifest).items() if label not in ("runs on", "ranks", "size")}


def _pair(manifest: PairManifest) -> dict[str, Cell]:
    shapes = manifest.shapes
    return {
        "dtype": manifest.dtype + (f", weights {manifest.weights}" if manifest.weights else ""),
        "draft": f"{manifest.draft_kind.method}, draft tokens K {value(manifest.draft_tokens)}",
        "prompt lookup": counted(manifest.lookup, "token") if manifest.lookup else "no",
        "sampling": value(manifest.sampling),
        "candidates": str(manifest.pair.candidates or "all"),
        "buckets": f"batch {value(shapes.batch)}; prefill {value(shapes.prefill)}; kv {value(shapes.kv)}",
        "graphs": str(len(manifest.graphs)),
    }


def _defaults(manifest: PairManifest, defaults: GenerationDefaults) -> dict[str, Cell]:
    """Return the defaults of generation that apply, and those that do not."""
    stochastic = "stochastic" in manifest.sampling
    sampling = f"temperature {defaults.temperature:g}, top_k {defaults.top_k}, top_p {defaults.top_p:g}"
    served = f"; a server samples at temperature {defaults.temperature:g}" if stochastic else ""
    applied = sampling if stochastic and defaults.do_sample else f"greedy{served}"
    left_out = defaults.not_applied(manifest.sampling)
    fields: dict[str, Cell] = {"end tokens": value(manifest.eos_ids), "by default": applied}
    return fields | ({"not applied": ", ".join(left_out)} if left_out else {})


def _gates(manifest: Manifest) -> dict[str, Cell]:
    """Return the verdict of the gates, their first finding, and the main numbers."""
    if not isinstance(manifest, PairManifest):
        return {"gates": Verdict("none: this kind of artifact has no gates", None)}
    if manifest.validation is None:
        return {"gates": Verdict("not validated", None)}
    validation = manifest.validation
    names = validation.get("gates", {})
    failed = {name: findings for name, findings in names.items() if findings}
    if manifest.passed:
        verdict = Verdict("passed" + (f": {', '.join(names)}" if names else ""), good=True)
    else:
        verdict = Verdict("FAILED" + "".join(f"; {name}: {found[0]}" for name, found in failed.items()), good=False)
    per_step = [f"{number(rate)} (K={k})" for k, rate in validation.get("tokens_per_step", {}).items()]
    return {"gates": verdict} | ({"tokens/step": ", ".join(per_step)} if per_step else {})


def changes_of(differences: Mapping[str, Any], before: str, after: str) -> Table:
    """Return the differences of two manifests as rows: what differs, and both values below their names."""
    headings = ("", before, after)
    return Table(headings, [*_graph_rows(differences["graphs"]), *_field_rows(differences), *_file_rows(differences)])


def _graph_rows(graphs: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    words = {"added": ("", "added"), "removed": ("removed", ""), "recompiled": ("", "recompiled")}
    for name, how in sorted((name, how) for how, names in graphs.items() for name in names):
        yield (f"graph {name}", *words[how])


def _field_rows(differences: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the fields whose values differ as they are shown; of measured speeds, which differ always, one."""
    for name, values in differences["fields"].items():
        shown = tuple(_shown(name, each) for each in (values["from"], values["to"]))
        if shown[0] != shown[1] and (not name.startswith(SPEEDS) or name == SPEED):
            yield (name, *shown)


def _shown(name: str, found: Any) -> str:
    if found == [] and name.startswith("validation.gates."):
        return "passed"  # no findings
    if found is None:
        return "-"
    last = name.rpartition(".")[2]
    return size(found) if last in BYTES and isinstance(found, int) else value(found)


def _file_rows(differences: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for top, changes in differences["files"].items():
        for how, names in changes.items():
            count = counted(len(names), "file")
            yield (
                f"files: {top}",
                f"{count} removed" if how == "removed" else "",
                "" if how == "removed" else f"{count} {how}",
            )


def settings_lines(
    defaults: GenerationDefaults, choice: Choice, sampling: Sequence[str], *, given: bool
) -> Iterator[str]:
    """Yield the settings of a call that samples by default, and a warning about defaults that it does not apply.

    `sampling` are the kinds of graphs of the artifact; `given`: the call gives its temperature.
    """
    if choice.temperature > 0 and not given:
        yield f"sampling: temperature {choice.temperature:g}, top_k {choice.top_k}, top_p {choice.top_p:g}"
    names = defaults.not_applied((*sampling, "stochastic") if given else sampling, sampled=choice.temperature > 0)
    if names:
        yield not_applied_warning(names)


def gate_warning(manifest: PairManifest) -> str | None:
    """Return a warning about an artifact that failed its gates or was never validated; None if it passed."""
    if manifest.passed:
        return None
    if manifest.validation is None:
        return f"warning: {manifest.name} was not validated: `tandem validate ARTIFACT` runs the gates"
    failed = [name for name, findings in manifest.validation.get("gates", {}).items() if findings]
    gates = f" ({', '.join(failed)})" if failed else ""
    return f"warning: {manifest.name} failed its gates{gates}: `tandem report ARTIFACT` shows the findings"
