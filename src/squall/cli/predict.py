"""`squall predict`: a rollout from the user's own initial states."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.files import refuse_existing
from squall._process.progress import reporting
from squall.cli.options import add_animate, add_run, add_weights, command_parser
from squall.runs.predict import predict_to_file, read_start
from squall.runs.trained import open_run


def parser() -> ArgumentParser:
    parser = command_parser("predict")
    add_run(parser)
    parser.add_argument(
        "--initial",
        type=Path,
        required=True,
        help="a .npy file (trajectory, channel, *space), or trajectories of any known format",
    )
    parser.add_argument(
        "--axes", type=str | None, default=None, help="a word per axis of that file, if it cannot say it: 'batch x y'"
    )
    parser.add_argument("--start", type=int, default=0, help="time index in that file of the first state that is read")
    parser.add_argument(
        "--fields", type=str, nargs="+", default=[], help="names that differ in the files: NAME=NAME_IN_THE_FILE"
    )
    parser.add_argument("--forcings", type=Path | None, default=None, help="a file with the conditions, if another")
    parser.add_argument("--steps", type=int, default=500, help="steps of the data's dt")
    add_weights(parser)
    add_animate(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file: .hdf5, .nc or .zarr; refused if it exists")
    return parser


def run(arguments: Namespace, console: Console) -> int:
    refuse_existing(arguments.out)
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}, but must be at least 1")
    trained = open_run(arguments.run, arguments.data, trust=arguments.trust)
    trained.load(arguments.checkpoint)
    start = read_start(
        trained,
        arguments.initial,
        arguments.steps,
        start=arguments.start,
        axes=arguments.axes,
        fields=arguments.fields,
        forcings=arguments.forcings,
    )
    kind, pictures = arguments.animate, []
    if kind is not None:
        from squall.report import check_animation, forecast_animations

        check_animation(kind)
        forecast_animations(arguments.out, kind, trained.source.fields, len(start.window))
    with reporting(console, "predicting", arguments.steps) as progress:
        about = {"run": str(arguments.run)}
        predict_to_file(trained, start, arguments.steps, arguments.out, about=about, progress=progress)
    if kind is not None:
        from squall.report import animate_forecast

        with console.status("drawing"):
            pictures = animate_forecast(arguments.out, kind)
    for path in (arguments.out, *pictures):
        print(path)
    return 0
