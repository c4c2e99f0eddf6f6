"""`squall evaluate`: errors of rollouts on the test trajectories."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.console import results_console
from squall.cli.options import add_animate, add_run, command_parser
from squall.runs.evaluate import conserved_quantities, evaluate_runs
from squall.runs.folder import RunFolder, evaluation_suffix


def parser() -> ArgumentParser:
    parser = command_parser("evaluate")
    add_run(parser)
    parser.add_argument("--integrator", type=str | None, default=None, help="another one than that of the training")
    parser.add_argument("--substeps", type=int, default=1, help="how many steps of it cover one dt")
    parser.add_argument("--steps", type=int | None, default=None, help="of a rollout; whole trajectories if left out")
    parser.add_argument("--stride", type=int | None, default=None, help="states between the starts of rollouts")
    parser.add_argument(
        "--events",
        type=float | dict[str, float],
        default=0.99,
        help="values above this quantile of the truth are events; or values by field, such as '{u: 2.5}'",
    )
    parser.add_argument(
        "--conserved",
        type=str,
        nargs="+",
        default=[],
        help="fields whose integral is conserved, or import paths of functions from states to one number each",
    )
    parser.add_argument(
        "--storms",
        type=str | None,
        default=None,
        help="on the sphere: the field whose maxima are storms, such as vorticity; of minima --storms=-msl",
    )
    parser.add_argument("--storm-share", type=float, default=0.995, help="the quantile of the truth that storms reach")
    parser.add_argument("--netcdf", type=Path | None, default=None, help="a file for fields and scores by lead time")
    add_animate(parser)
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, such as cuda")
    return parser


def run(arguments: Namespace, console: Console) -> int:
    from squall.evaluation import Scoring
    from squall.report import check_animation, evaluation_table, write_animations, write_figures

    if arguments.animate is not None:
        check_animation(arguments.animate)
    scoring = Scoring(
        events=arguments.events,
        conserved=conserved_quantities(arguments.conserved),
        storms=arguments.storms,
        storm_share=arguments.storm_share,
    )
    with console.status("rolling out"):
        (evaluation,) = evaluate_runs(
            [arguments.run],
            method=arguments.integrator,
            count=arguments.substeps,
            device=arguments.device,
            data=arguments.data,
            trust=arguments.trust,
            steps=arguments.steps,
            stride=arguments.stride,
            scoring=scoring,
            netcdf=arguments.netcdf,
        )
        suffix = evaluation_suffix(arguments.integrator, arguments.substeps)
        pictures = write_figures(arguments.run, suffix)
        if arguments.animate is not None:
            pictures += write_animations(arguments.run, suffix, arguments.animate)
    results_console().print(evaluation_table(evaluation))
    files = [arguments.netcdf] if arguments.netcdf is not None else []
    for path in (RunFolder(arguments.run).path / f"evaluation{suffix}.json", *files, *pictures):
        print(path)
    return 0
