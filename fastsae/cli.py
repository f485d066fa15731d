"""The command line: ``fastsae demo | train | suite | plan | eval | probe | report | harvest |
convert | compare | encode | pages | stitch | meta | steer | bench | info``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from fastsae.commands.compare import Compare, Meta, Stitch
from fastsae.commands.data import Encode, Harvest
from fastsae.commands.evaluate import Eval, Probe, Report
from fastsae.commands.pages import Pages
from fastsae.commands.steer import Steer
from fastsae.commands.suite import Suite
from fastsae.commands.tools import Bench, Convert, Info
from fastsae.commands.train import Demo, Plan, Train, with_files

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Suite, tyro.conf.subcommand("suite")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Harvest, tyro.conf.subcommand("harvest")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Pages, tyro.conf.subcommand("pages")]
    | Annotated[Stitch, tyro.conf.subcommand("stitch")]
    | Annotated[Meta, tyro.conf.subcommand("meta")]
    | Annotated[Steer, tyro.conf.subcommand("steer")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        lines = str(error) if isinstance(error, MemoryError) else " ".join(str(error).split())
        sys.exit(f"fastsae: error: {lines}")
    except KeyboardInterrupt:
        sys.exit(130)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; errors end it with one line on stderr and a status that is not 0.

    What is wrong with an argument itself is in the parser's own words, with status 2.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with _errors_in_one_line():
        args = sys.argv[1:] if args is None else args
        parameters: dict[str, Any] = {}
        if args[:1] == ["bench"]:  # the options are bench/'s own
            Bench(tuple(args[1:])).run()
        if args[:1] == ["train"]:
            rest, parameters = with_files(args[1:])
            args = ["train", *rest]
        elif any(argument.startswith("--selection.") for argument in args):
            raise ValueError("--selection.PARAM: expected with train only")
        command: Any = tyro.cli(
            Command,
            prog="fastsae",
            description="Sparse autoencoders that do only the work that is there.",
            args=args,
            config=config,
        )
        if isinstance(command, Train):
            command.run(parameters)
        else:
            command.run()
