"""The verb `sweep`: reads its words, runs the grid, prints what it told.

Called by `fledge.cli` only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fledge.cli import VERBS, Parser, positive
from fledge.cli_overrides import override, split_overrides
from fledge.errors import EXIT_DONE, UserError


def sweep(words: list[str]) -> int:
    """`fledge sweep RECIPE --grid KEY=A,B ...`."""
    parser = Parser("sweep", VERBS["sweep"].summary)
    parser.add_argument("recipe", help="a built-in recipe or a .toml file")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SECTION.KEY=A,B,...",
        help="values of a key to try; several --grid are combined",
    )
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each point (default 1)")
    parser.add_argument("--out", type=Path, help="folder of the sweep (default: runs/sweep-RECIPE)")
    parser.epilog = (
        "a sweep that was stopped goes on where it was; other keys for all runs are given as "
        "--section.key VALUE"
    )
    own, overrides = split_overrides(words)
    args = parser.parse_args(own)
    from fledge import config
    from fledge import sweep as sweeping
    from fledge.plan import hardware, planner

    if not args.grid:
        raise UserError(
            "a sweep needs a grid",
            "it says which keys take which values",
            "add --grid model.depth=2,3,4",
        )
    name, recipe = config.load_recipe(args.recipe)
    todo = sweeping.points(sweeping.parse_grid(args.grid), args.seeds)
    machine = hardware.detect()
    planned = 0.0
    for point in todo:  # every point must make a plan before the first one trains
        given = [f"--{key}={value}" for key, value in point.settings.items()]
        plan = planner.resolve(override(recipe, [*overrides, *given]), machine)
        planned += planner.stage_seconds(plan)["base"]
    print(
        f"{len(todo)} runs, about {planned / 60:.0f} minutes together on this machine",
        file=sys.stderr,
    )
    out = args.out or Path("runs") / f"sweep-{name}"
    out.mkdir(parents=True, exist_ok=True)
    sweeping.run_points(
        args.recipe, todo, out, overrides, lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(sweeping.conclude(name, todo, out), end="")
    return EXIT_DONE
