"""Whether imported weights fit a stage that a YAML makes."""

from fnmatch import fnmatch

from unclip_pl.stages.base import Stage
from unclip_pl.stages.settings import changes, settings_of


def require_same_stage(stage: Stage, imported: Stage) -> None:
    """The parameters have the same names and shapes, and the settings but for free ones agree."""
    assert {k: v.shape for k, v in stage.state_dict().items()} == {
        k: v.shape for k, v in imported.state_dict().items()
    }
    theirs = settings_of(type(stage), dict(imported.hparams))
    differing = [
        key
        for key in changes(theirs, dict(stage.hparams))
        if not any(fnmatch(key, pattern) for pattern in stage.may_change)
    ]
    assert not differing
    for kind in ("sampling", "cond_dropout"):  # these are those of what was published as well
        assert stage.hparams.get(kind) == imported.hparams.get(kind)
