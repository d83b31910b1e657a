"""`unclip serve`: a studio in the browser, and an API."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from unclip_pl.cli.options import DeviceOptions, UpsamplerOptions
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count, GuidedSamplingOptions, PriorSamplingOptions

if TYPE_CHECKING:
    from unclip_pl.studio.models import Models
LARGEST = UpsamplerOptions(size=1024)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What draws.

    Args:
        decoder: a checkpoint or release; by default the one in the package
        prior: "diffusion" (the default) or "ar", those in the package; or a checkpoint or release
        store: the embedding store whose principal components are probed; by default OpenMoji's
    """

    decoder: str | None = None
    prior: str | None = None
    sampling: GuidedSamplingOptions
    prior_sampling: PriorSamplingOptions
    upsamplers: UpsamplerOptions = LARGEST
    compute: DeviceOptions
    store: Path | None = None

    def load(self) -> "Models":
        """The models, with the sampling settings of the options as those of the stages."""
        from unclip_pl.stages.decoder import Decoder
        from unclip_pl.stages.upsampler import Upsampler
        from unclip_pl.studio.models import Models

        models = Models.load(
            self.decoder, self.prior, self.upsamplers.paths, self.store, **self.compute.kwargs()
        )
        # without the stages: the studio may let them go
        priors = [
            SimpleNamespace(sampling=u.prior.sampling)
            for u in models.with_prior.values()
            if u.prior
        ]

        def as_options_say(stage: Any) -> None:
            if isinstance(stage, Decoder):
                stage.sampling = self.sampling.of(stage)
            elif isinstance(stage, Upsampler):
                stage.sampling = self.upsamplers.sampling_of(stage)
            else:
                stage.sampling = self.prior_sampling.among(stage, priors).of(stage)

        models.prepare_all(as_options_say)
        return models


def serve(
    *,
    models: ModelOptions,
    runs: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: Path | None = None,
    queue: Count = 64,
) -> None:
    """Open a studio in the browser.

    Draw pictures from captions, vary, interpolate, edit, inpaint, enlarge and probe them. Needs
    the extra "web".

    Args:
        size: pixels per side of the largest pictures that may be asked for
        runs: a folder of training runs to watch
        host: the address to listen at; 0.0.0.0: every one of this machine, for others to come in
        port: 0: any that is free
        auth: who may come in: a UTF-8 file with one name:password per line
        queue: requests that may wait at a time
        models: what draws
    """
    if runs is not None and not runs.is_dir():
        raise UserError(f"There is no folder {runs}: check --runs.")
    require_weights(models.decoder, models.prior, models.upsamplers.paths)
    try:
        from unclip_pl.studio import server
    except ModuleNotFoundError as error:
        raise UserError(
            f'The studio needs the extra "web" ({error.name} is missing): install it with '
            "pip install 'unclip_pl[web]'."
        ) from None
    from unclip_pl.studio.engine import Engine
    from unclip_pl.studio.guard import read_users

    users = None if auth is None else read_users(auth)
    listener = server.bound(host, port)
    engine = Engine(models.load(), queue)
    app = server.build(engine, runs, users)
    address = f"[{host}]" if ":" in host else host
    listening = listener.getsockname()[1]
    print(
        f"The studio is at http://{address}:{listening}, its API at /api/docs. Ctrl-C ends it.",
        flush=True,
    )
    server.serve(app, listener)
    print("The studio is closed.", flush=True)
