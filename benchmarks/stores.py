"""Publish and pull against the best plain clients, on the same local servers, in turns, in one run.

    python benchmarks/stores.py s3  [--gigabytes 2] [--files 200 4] [--rounds 5]     against s5cmd and the AWS CLI
    python benchmarks/stores.py hub [...]                                            against huggingface_hub's functions
    python benchmarks/stores.py oci [...]                                            against skopeo
    python benchmarks/stores.py delta                                                what a changed graph sends

Rates are of the artifact's bytes over the wall time of a whole process, with its start, hashing and fsync. Peak
memory is of that process. The S3 server is SeaweedFS, the Hub the tests' own, the OCI registry docker-registry:
absolute rates say little, ratios more.
`--keep FILE` adds the runs to a file and shows the medians of all that it has, so that rounds may be run one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
BIN = Path(sys.executable).parent
TANDEM = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "-q"]
MIB = 1 << 20


def make_artifact(root: Path, size: int, count: int) -> Path:
    """A validated artifact of `count` files of random bytes, with the manifest that they need."""
    from support import small_artifacts as small

    made = small.make_validated(root / "artifact", root / "work").root
    data = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    each = size // count
    for number in range(count):
        path = made / "weights" / f"part-{number}.safetensors"
        digest = hashlib.sha256()
        with path.open("wb") as file:
            left = each
            while left:
                piece = os.urandom(min(left, 8 * MIB))
                digest.update(piece)
                left -= file.write(piece)
        entry = {"sha256": digest.hexdigest(), "size": each}
        data["files"][f"weights/part-{number}.safetensors"] = entry
    (made / "manifest.json").write_text(json.dumps(data | {"version": f"v{count}"}), encoding="utf-8")
    return made


def run(command: list[str], environ: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak memory (MiB) of a process."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    shown = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command}: {shown.decode()[-2000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@contextmanager
def s3() -> Iterator[tuple[dict[str, str], dict[str, Callable[..., list[str]]]]]:
    """The server's environment, and for each client a command for each direction."""
    import boto3

    from support import s3_server

    with s3_server.running() as server:
        environ = server.environ()
        key, secret = server.identities["rw"]
        boto3.client("s3", endpoint_url=server.endpoint, aws_access_key_id=key, aws_secret_access_key=secret,
                     region_name="us-east-1").create_bucket(Bucket="bench")  # fmt: skip
        environ |= {"S3_ENDPOINT_URL": server.endpoint, "REGISTRY": "s3://bench/tandem-{}"}
        yield environ, {
            "s5cmd": lambda way, made, out, n: (
                [str(BIN / "s5cmd"), "cp", f"{made}/", f"s3://bench/s5cmd-{n}/"] if way == "publish"
                else [str(BIN / "s5cmd"), "cp", f"s3://bench/s5cmd-{n}/*", f"{out}/"]
            ),
            "aws": lambda way, made, out, n: (
                [str(BIN / "aws"), "s3", "cp", "--recursive", "--quiet", str(made), f"s3://bench/aws-{n}/"]
                if way == "publish"
                else [str(BIN / "aws"), "s3", "cp", "--recursive", "--quiet", f"s3://bench/aws-{n}/", str(out)]
            ),
        }  # fmt: skip


UPLOAD = "import sys; from huggingface_hub import HfApi as A; A().create_repo(sys.argv[1], exist_ok=True); A().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"  # noqa: E501
DOWNLOAD = "import sys; from huggingface_hub import snapshot_download as d; d(sys.argv[1], cache_dir=sys.argv[2])"


@contextmanager
def hub() -> Iterator[tuple[dict[str, str], dict[str, Callable[..., list[str]]]]]:
    """As `s3`, on the tests' Hub, which has LFS and no Xet."""
    from support import git_hub

    with git_hub.running() as server:
        environ = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "REGISTRY": "hf://org-{}"}  # fmt: skip
        yield environ, {
            "huggingface_hub": lambda way, made, out, n: (
                [sys.executable, "-c", UPLOAD, f"plain/repo-{n}", str(made)] if way == "publish"
                else [sys.executable, "-c", DOWNLOAD, f"plain/repo-{n}", str(out)]
            ),
        }  # fmt: skip


@contextmanager
def oci() -> Iterator[tuple[dict[str, str], dict[str, Callable[..., list[str]]]]]:
    """As `s3`, on Docker's registry. skopeo copies between it and a folder in OCI's layout."""
    from support import oci_registry

    with oci_registry.running("distribution") as server:
        plain = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]

        def skopeo(way: str, made: Path, out: Path, place: str) -> list[str]:
            there = f"docker://{server.host}/skopeo/small-{place}:1"
            layout = made.parent / "layout"
            if way == "publish" and not layout.exists():  # not timed: it is made before the command runs
                url = f"oci://{server.host}/layout"
                run([*TANDEM, "publish", str(made), "--to", url, "--version", "1"], {"PYTHONPATH": str(HERE.parent)})
                run([*plain, f"docker://{server.host}/layout/small:1", f"oci:{layout}:1"], {})
            return [*plain, f"oci:{layout}:1", there] if way == "publish" else [*plain, there, f"oci:{out}:1"]

        yield {"REGISTRY": f"oci://{server.host}/tandem-{{}}"}, {"skopeo": skopeo}


Runs = dict[str, list[tuple[float, float, float]]]


def measure(kind: str, made: Path, count: int, number: int, skip: list[str], work: Path) -> Runs:
    """What `run` says of one round: both directions, every client in turn, on a fresh server."""
    found: Runs = {}
    with {"s3": s3, "hub": hub, "oci": oci}[kind]() as (environ, clients):
        names = [name for name in ("tandem", *clients) if name not in skip]
        order = names[number % len(names) :] + names[: number % len(names)]  # who goes first finds colder memory
        for way in ("publish", "pull"):
            for who in order:
                out, cache = work / "out", work / "cache"
                place = f"{count}-{number}"
                if who == "tandem":
                    url = environ["REGISTRY"].format(place)
                    tail = [str(made), "--to", url] if way == "publish" else [f"{url}/small@v{count}", str(out)]
                    command = [*TANDEM, way, *tail]
                else:
                    out.mkdir()
                    command = clients[who](way, made, out, place)
                ours = {"TANDEM_CACHE": str(cache), "PYTHONPATH": str(HERE.parent)} if who == "tandem" else {}
                found.setdefault(f"{way} {who}", []).append(run(command, environ | ours))
                for folder in (out, cache):
                    shutil.rmtree(folder, ignore_errors=True)
    return found


def show(kind: str, size: int, count: int, found: Runs) -> None:
    """One line for each direction: medians of all rounds."""
    for way in ("publish", "pull"):
        runs = {
            name.split()[1]: list(zip(*rows, strict=True)) for name, rows in found.items() if name.split()[0] == way
        }
        rates = {who: size / MIB / statistics.median(seconds) for who, (seconds, _, _) in runs.items()}
        spent = {who: statistics.median(processor) for who, (_, processor, _) in runs.items()}
        ratio = rates["tandem"] / max(rate for who, rate in rates.items() if who != "tandem")
        print(f"{kind} {way} {size / 1e9:.1f} GB in {count} files, {len(found[f'{way} tandem'])} rounds, "
              "MiB/s (processor s): "
              + ", ".join(f"{who} {rate:.0f} ({spent[who]:.1f})" for who, rate in rates.items())
              + f"; ratio to the best {ratio:.2f}, our peak {max(runs['tandem'][2]):.0f} MiB", flush=True)  # fmt: skip


def kept(path: Path, name: str, found: Runs) -> Runs:
    """These runs and those that the file has, which gets them."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    there = data.setdefault(name, {})
    for key, rows in found.items():
        there.setdefault(key, []).extend(rows)
    path.write_text(json.dumps(data), encoding="utf-8")
    return there


def delta(work: Path) -> None:
    """Bytes that reach the server when one graph of an artifact changes, counted by a proxy before it."""
    from support import fault_proxy, s3_server
    from support import small_artifacts as small

    with s3_server.running() as server, fault_proxy.before(server.endpoint) as proxy:
        os.environ.update(server.environ() | {"AWS_ENDPOINT_URL": proxy.endpoint})
        import boto3

        from pipeline.registry.publish import publish

        boto3.client("s3", endpoint_url=server.endpoint).create_bucket(Bucket="bench")
        made = small.make_validated(work / "one", work / "work", size=20_000_000).root
        publish(made, "s3://bench/delta", ["latest"])
        first = proxy.sent_bytes
        path = made / "graphs/decode-b1-t1-s32/graph.bin"
        path.write_bytes(os.urandom(20_000_000))
        data = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
        data["files"][str(path.relative_to(made))] = {"sha256": small.digests(made)[str(path.relative_to(made))],
                                                      "size": 20_000_000}  # fmt: skip
        (made / "manifest.json").write_text(json.dumps(data | {"version": "2"}), encoding="utf-8")
        publish(made, "s3://bench/delta", ["latest"])
        second = proxy.sent_bytes - first
        print(f"first release sent {first:,} bytes; one changed graph of 20,000,000 bytes sent {second:,} "
              f"({100 * (second / 20_000_000 - 1):.2f}% more than the graph)")  # fmt: skip


def start_up(rounds: int) -> None:
    """The command line's start, and what a pull imports before it asks anybody."""
    commands = {
        "tandem pull --help": [*TANDEM, "pull", "--help"],
        "import of the pull stage": [sys.executable, "-c", "import pipeline.registry.pull"],
    }
    for name, command in commands.items():
        times = [run(command, {"PYTHONPATH": str(HERE.parent)})[1] for _ in range(rounds)]
        print(f"{name}: {statistics.median(times):.2f} processor seconds (median of {rounds})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["s3", "hub", "oci", "delta", "start-up"])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, nargs="+", default=[200, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="clients to leave out")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tandem-stores-"))
    try:
        if given.kind == "delta":
            delta(work)
        elif given.kind == "start-up":
            start_up(given.rounds)
        else:
            for count in given.files:
                size, name = int(given.gigabytes * 1e9), f"{given.kind} {given.gigabytes} GB {count}"
                made = make_artifact(work / f"{given.kind}-{count}", size, count)
                keep = given.keep or work / "runs.json"
                for _ in range(given.rounds):
                    number = len(kept(keep, name, {}).get("pull tandem", ()))
                    kept(keep, name, measure(given.kind, made, count, number, given.skip, work))
                show(given.kind, size, count, kept(keep, name, {}))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
