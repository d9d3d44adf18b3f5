"""The state of the local Hub: real git repositories, and large files beside them."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTED = re.compile(r"version https://git-lfs\S+\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")


@dataclass
class GitHub:
    """State. `token` may write everywhere; `reader` may read; `endpoint` and `cdn` may be those of proxies."""

    root: Path
    token: str = "hf_writer"
    reader: str = "hf_reader"
    endpoint: str = ""
    cdn: str = ""
    log: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    uploaded: int = 0
    known: set[tuple[str, str]] = field(default_factory=set)
    trees: dict[tuple[str, str], dict[str, dict[str, Any]]] = field(default_factory=dict)
    small: dict[str, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def repo(self, name: str) -> Path:
        return self.root / "repos" / f"{name}.git"

    def blob(self, oid: str) -> Path:
        return self.root / "lfs" / oid

    def git(self, name: str, *args: str, data: bytes | None = None, **environ: str) -> bytes:
        """Run git in a repository; its failures are ours."""
        env = os.environ | environ | {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
                                      for what, value in (("NAME", "tester"), ("EMAIL", "t@example.org"))}  # fmt: skip
        command = ["git", f"--git-dir={self.repo(name)}", *args]
        return subprocess.run(command, input=data, capture_output=True, check=True, env=env).stdout

    def resolve(self, name: str, revision: str) -> str | None:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            try:
                return self.git(name, "rev-parse", "--verify", "-q", f"{ref}^{{commit}}").decode().strip()
            except subprocess.CalledProcessError:
                continue
        return None

    def create(self, name: str) -> None:
        self.repo(name).mkdir(parents=True)
        self.git(name, "init", "-q", "--bare", "-b", "main")
        self.commit(name, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, [], None)

    def commit(
        self, name: str, branch: str, title: str, files: dict[str, bytes], gone: list[str], parent: str | None
    ) -> str:  # fmt: skip
        """Write a commit and move the branch, from exactly `parent`."""
        index = self.repo(name) / f"index-{threading.get_ident()}"
        env = {"GIT_INDEX_FILE": str(index)}
        try:
            self.git(name, "read-tree", parent or "--empty", **env)
            lines = [f"0 {'0' * 40}\t{path}" for path in gone]
            for path, data in files.items():
                blob = self.git(name, "hash-object", "-w", "--stdin", data=data).decode().strip()
                lines.append(f"100644 {blob}\t{path}")
            self.git(name, "update-index", "--index-info", data="".join(f"{x}\n" for x in lines).encode(), **env)
            tree = self.git(name, "write-tree", **env).decode().strip()
        finally:
            index.unlink(missing_ok=True)
        parents = ["-p", parent] if parent else []
        made = self.git(name, "commit-tree", tree, *parents, "-m", title).decode().strip()
        self.git(name, "update-ref", f"refs/heads/{branch}", made, parent or "0" * 40)
        return made

    def tree(self, name: str, commit: str) -> dict[str, dict[str, Any]]:
        """Files of a commit as the tree route lists them; commits do not change, so each is read once."""
        with self.lock:
            if (name, commit) not in self.trees:
                self.trees[name, commit] = self.read_tree(name, commit)
            return self.trees[name, commit]

    def read_tree(self, name: str, commit: str) -> dict[str, dict[str, Any]]:
        found = {}
        for line in self.git(name, "ls-tree", "-r", "-l", "-z", commit).decode().split("\0")[:-1]:
            facts, path = line.split("\t", 1)
            _, _, oid, size = facts.split()
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": int(size), "path": path}
            if int(size) < 200 and oid not in self.small:
                self.small[oid] = self.git(name, "cat-file", "blob", oid).decode(errors="replace")
            if pointed := POINTED.fullmatch(self.small.get(oid, "")):
                entry |= {"size": int(pointed[2])}
                entry["lfs"] = {"oid": pointed[1], "size": int(pointed[2]), "pointerSize": int(size)}
            found[path] = entry
        return found
