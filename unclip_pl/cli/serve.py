"""`unclip serve`: a studio in the browser, and an API."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip_pl.cli.options import (
    SIZES,
    AddCommand,
    add_decoder_option,
    add_device_options,
    add_upsampler_options,
    device_kwargs,
    upsampler_paths,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import (
    add_prior_option,
    add_prior_sampling_options,
    add_sampling_options,
    override_sampling,
    positive_int,
)

if TYPE_CHECKING:
    from unclip_pl.studio.models import Models


def add(command: AddCommand) -> None:
    serve = command(
        "serve",
        run,
        "Open a studio in the browser: draw pictures from captions, vary, interpolate, edit, "
        'inpaint, enlarge and probe them. Needs the extra "web".',
    )
    add_decoder_option(serve)
    add_prior_option(serve)
    add_sampling_options(serve)
    add_prior_sampling_options(serve)
    serve.add_argument(
        "--size",
        type=int,
        choices=SIZES,
        default=1024,
        help="pixels per side of the largest pictures that may be asked for",
    )
    add_upsampler_options(serve, "--upsampler-steps")
    add_device_options(serve)
    serve.add_argument(
        "--store",
        type=Path,
        help="the embedding store whose principal components are probed; by default OpenMoji's",
    )
    serve.add_argument("--runs", type=Path, help="a folder of training runs to watch")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at; 0.0.0.0: every one of this machine, for others to come in",
    )
    serve.add_argument("--port", type=int, default=7860, help="0: any that is free")
    serve.add_argument(
        "--auth",
        type=Path,
        metavar="FILE",
        help="who may come in: a UTF-8 file with one name:password per line",
    )
    serve.add_argument(
        "--queue", type=positive_int, default=64, help="requests that may wait at a time"
    )


def load_models(arguments: argparse.Namespace) -> "Models":
    """The models of the options, with their sampling settings as those of the stages."""
    from unclip_pl.stages.ar_prior import ARPrior
    from unclip_pl.stages.decoder import Decoder
    from unclip_pl.stages.upsampler import Upsampler
    from unclip_pl.studio.models import Models

    models = Models.load(
        arguments.decoder,
        arguments.prior,
        upsampler_paths(arguments),
        arguments.store,
        **device_kwargs(arguments),
    )
    options, of_ar = vars(arguments), ("prior_temperature", "prior_top_p")

    def as_options_say(stage: Any) -> None:
        if isinstance(stage, Decoder):
            stage.sampling = override_sampling(stage, options)
            return
        if isinstance(stage, Upsampler):
            stage.sampling = override_sampling(stage, options, "upsampler_")
            return
        own = {
            name: value
            for name, value in options.items()
            if arguments.prior is not None or (name in of_ar) == isinstance(stage, ARPrior)
        }
        stage.sampling = override_sampling(stage, own, "prior_")

    models.prepare_all(as_options_say)
    return models


def run(arguments: argparse.Namespace) -> None:
    try:
        from unclip_pl.studio import server
    except ModuleNotFoundError as error:
        raise UserError(
            f'The studio needs the extra "web" ({error.name} is missing): install it with '
            "pip install 'unclip_pl[web]'."
        ) from None
    from unclip_pl.studio.engine import Engine
    from unclip_pl.studio.guard import read_users

    if arguments.runs is not None and not arguments.runs.is_dir():
        raise UserError(f"There is no folder {arguments.runs}: check --runs.")
    users = None if arguments.auth is None else read_users(arguments.auth)
    listener = server.bound(arguments.host, arguments.port)
    engine = Engine(load_models(arguments), arguments.queue)
    app = server.build(engine, arguments.runs, users)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    port = listener.getsockname()[1]
    print(
        f"The studio is at http://{host}:{port}, its API at /api/docs. Ctrl-C ends it.", flush=True
    )
    server.serve(app, listener)
    print("The studio is closed.", flush=True)
