"""Send the shards of a build to the recipe's registries in a thread, while graphs compile and gates run.

Makes no release: `tandem publish` does, and then finds the shards there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pipeline.artifact.manifest import FileEntry
from pipeline.errors import InputError, TandemError
from pipeline.extras import require
from pipeline.progress import Progress
from pipeline.registry.publish import send_ahead, sends_ahead
from pipeline.stages.background import Background
from pipeline.stages.settings import BuildSettings
from pipeline.stages.shard import Shards
from pipeline.stores.base import extras_of

OPTION = "--send-weights"


def check_registries(settings: BuildSettings) -> None:
    """Check, before any work, that weights can be sent if the build is to send them.

    Raises:
        InputError: no registry of the recipe takes files before their release. HostError: a client is not installed.

    """
    if not settings.send_weights:
        return
    urls = _urls(settings)
    if not urls:
        what = "the recipe lists no registry that takes weights before their release"
        raise InputError(what, where=OPTION, fix="list a folder or s3://bucket/prefix under `publish` in the recipe")
    require(extras_of(*urls), OPTION)


def start_sending(background: Background, settings: BuildSettings, shards: Shards) -> list[Callable[[], None]]:
    """Start to send shards to each registry; return functions that wait for the end."""
    if not settings.send_weights:
        return []
    return [background.start(partial(_send, settings, shards, url)) for url in _urls(settings)]


def _urls(settings: BuildSettings) -> list[str]:
    return [target.to for target in settings.recipe.publish if sends_ahead(target.to)]


def _send(settings: BuildSettings, shards: Shards, url: str, progress: Progress) -> None:
    """Send shards to one registry; a failure is logged, and leaves the work to `tandem publish`."""
    files = {shard.path.as_posix(): FileEntry(sha256=shard.sha256, size=shard.size) for shard in shards.files}
    try:
        progress("send", 0, 1)  # ends here if the build has ended
        sent = send_ahead(url, shards.root, files, lambda _: progress("send", 0, 1))
    except TandemError as error:
        settings.log(f"weights not sent to {url}: {error}; `tandem publish` sends them")
        return
    size = sum(files[name].size for name in sent)
    settings.log(f"weights sent to {url}: {len(sent)} files, {size / 1e9:.2f} GB")
