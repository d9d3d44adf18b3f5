"""The entry point `tandem`: the table of commands, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from pipeline import __version__
from pipeline.cli.console import Console, colours_allowed, print_error
from pipeline.cli.groups import QUIET, VERBOSE, Lazy, LazyGroup
from pipeline.cli.usage import usage_error
from pipeline.cli.utf8 import use_utf8_mode, utf8_output
from pipeline.errors import BUG_CODE, INTERRUPTED_CODE, HostError, InputError, Problem, TandemError, as_data

COMMANDS = [
    Lazy("init", "pipeline.cli.init:init", "Write a first recipe for the target SOURCE."),
    Lazy("build", "pipeline.cli.build:build", "Build RECIPE into a validated artifact."),
    Lazy(
        "plan",
        "pipeline.cli.plan:plan",
        "Show the graphs of RECIPE, and the time, memory and disk that its build takes.",
    ),
    Lazy("inspect", "pipeline.cli.artifacts:inspect", "Show what ARTIFACT holds and needs."),
    Lazy("verify", "pipeline.cli.artifacts:verify", "Check the files of ARTIFACT against its manifest."),
    Lazy("diff", "pipeline.cli.artifacts:diff", "Compare two artifacts or releases."),
    Lazy("validate", "pipeline.cli.validate:validate", "Run the validation gates on ARTIFACT again."),
    Lazy("report", "pipeline.cli.validate:report", "Show one parity report, or compare two."),
    Lazy("run", "pipeline.cli.run:run", "Generate text with ARTIFACT."),
    Lazy("bench", "pipeline.cli.run:bench", "Measure ARTIFACT with and without speculation."),
    Lazy("publish", "pipeline.cli.publish:publish", "Publish ARTIFACTS as an immutable release."),
    Lazy("sign", "pipeline.cli.publish:sign", "Sign the manifest of ARTIFACT."),
    Lazy("pull", "pipeline.cli.registry:pull", "Pull a release and verify it."),
    Lazy("copy", "pipeline.cli.copy:copy_", "Copy a release to another registry."),
    Lazy("save", "pipeline.cli.copy:save_", "Save a release to one file."),
    Lazy("load", "pipeline.cli.copy:load_", "Load a release from one file into a registry."),
    Lazy("ls", "pipeline.cli.registry:ls", "List the releases of a registry."),
    Lazy("yank", "pipeline.cli.registry:yank_", "Mark a release as not to be used."),
    Lazy("gc", "pipeline.cli.registry:gc", "Remove unused blobs from a registry."),
    Lazy("alias", "pipeline.cli.alias:alias", "Set, list and roll back aliases of releases."),
    Lazy("cache", "pipeline.cli.cache:cache", "Manage the local and the shared cache of compiled graphs."),
    Lazy("recipe", "pipeline.cli.recipes:recipe", "Check and lock recipes."),
    Lazy("distill", "pipeline.cli.distill:distill", "Train a draft for the target of RECIPE."),
    Lazy("draft", "pipeline.cli.draft:draft", "Examine drafts, start a recipe from one, convert pickled ones."),
    Lazy("tune", "pipeline.cli.tune:tune", "Measure which K and buckets are best for RECIPE."),
    Lazy("serve", "pipeline.cli.serve:serve", "Serve ARTIFACT with vLLM."),
    Lazy("nxdi", "pipeline.cli.neuron:nxdi", "Configure or compile RECIPE with NxD Inference."),
    Lazy("vllm-args", "pipeline.cli.neuron:vllm_args", "Print the vLLM command for an NxD Inference package."),
    Lazy("vllm-cache", "pipeline.cli.neuron:vllm_cache", "Ship compile caches of vLLM's Neuron plugin."),
    Lazy("neuron", "pipeline.cli.neuron:neuron", "Try the Neuron backend on this host."),
    Lazy("doctor", "pipeline.cli.doctor:doctor", "Check what this machine can build and run."),
    Lazy(
        "completion",
        "pipeline.cli.completion:completion",
        "Print or install a script for shell completion.",
    ),
]
"""Every command: its module and its line in `tandem --help`, which is also the first sentence of its help."""


class Tandem(LazyGroup):
    """Turns errors into messages and exit codes."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command line with output in UTF-8; that of this process in UTF-8 mode."""
        if not args and options.get("args") is None:
            use_utf8_mode()
        utf8_output()
        return super().main(*args, **options)

    def make_context(self, info_name: str | None, args: Any, *rest: Any, **options: Any) -> click.Context:
        """Parse the words before the command's name."""
        console = Console(json="--json" in args)  # wrong options are found before `--json` is read
        try:
            context = super().make_context(info_name, args, *rest, **options)
        except click.NoSuchOption as error:
            _exit_with(console, usage_error(error))
        context.ensure_object(Console).json = console.json
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; show a traceback only with -v."""
        console = ctx.ensure_object(Console)
        if not colours_allowed():  # click reads no variable
            ctx.color = False
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            _exit_with(console, usage_error(error))
        except KeyboardInterrupt:
            _end(console, "interrupted; run the same command to continue", INTERRUPTED_CODE)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of stdout closed it: click exits without a message
            if (ours := _of_ours(error)) is not None:
                _exit_with(console, ours)
            traceback.print_exception(error)
            _end(console, "unexpected error: this is a bug in Tandem; report it with the traceback", BUG_CODE)
        finally:
            console.close()


def _exit_with(console: Console, error: TandemError) -> NoReturn:
    console.close()
    print_error(error, with_traceback=console.verbose)
    _print_data(console, error.problems, error.exit_code)
    sys.exit(error.exit_code)


def _end(console: Console, line: str, code: int) -> NoReturn:
    """End a command with a line on stderr for an error that is none of ours."""
    console.close()
    click.echo(line, err=True)
    _print_data(console, [Problem("", line)], code)
    sys.exit(code)


def _print_data(console: Console, problems: Sequence[Problem], code: int) -> None:
    """Print an error as JSON on stdout, for a command with `--json`."""
    if console.json:
        click.echo(json.dumps(as_data(problems, code), indent=1))


def _of_ours(error: Exception) -> TandemError | None:
    """Return an error that a user can fix, or the one that an exception stands for; None for a bug."""
    if isinstance(error, TandemError):
        return error
    if isinstance(error, OSError):
        return _host_error(error)
    if isinstance(error, ModuleNotFoundError):
        from pipeline.extras import missing_package  # keeps the metadata of packages out of `--help`

        if (missing := missing_package(error)) is not None:
            missing.__cause__ = error
            return missing
    return None


def _host_error(error: OSError) -> TandemError:
    """Return the error of the operating system as one of ours, with the files it names."""
    files = [str(file) for file in (error.filename, error.filename2) if file is not None]
    if error.errno == errno.ENAMETOOLONG:
        name = max(files, key=len, default="")
        what = f"no file can have this name of {len(name)} characters"
        too_long = InputError(what, where=f"{name[:60]}...", fix="give the path of a file or folder, or a name")
        too_long.__cause__ = error
        return too_long
    host_error = HostError(
        error.strerror or str(error), where=" -> ".join(files), fix="run the command again with -v for a traceback"
    )
    host_error.__cause__ = error
    return host_error


@click.group(
    cls=Tandem, commands=COMMANDS, params=[VERBOSE, QUIET], context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__)
def main() -> None:
    """Compile a target LLM and its draft in tandem: one recipe in, one validated artifact out."""
