"""Settings of a picture, back into the form of the tab in which it was made."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from unclip_pl.studio import html
from unclip_pl.studio.album import Album, Print
from unclip_pl.studio.forms import PICTURES
from unclip_pl.studio.picture_files import settings_in
from unclip_pl.studio.requests import Upsample, described, request_of
from unclip_pl.studio.tabs import Tab
from unclip_pl.utils.errors import UserError


class Restoring:
    """Fills the forms of a page.

    Args:
        made: the tabs of the page by their names.
    """

    def __init__(self, made: Mapping[str, Tab]) -> None:
        self.made = made

    def components(self) -> list[Any]:
        """Those of all forms, in the order of what `filled` returns after its tab."""
        return [part for tab in self.made.values() for part in tab.form.components()]

    def filled(self, settings: dict[str, Any]) -> list[Any]:
        """A sentence, the tab to open, and what the components show.

        Raises:
            UserError: these are no settings, or not for this studio.
        """
        request = request_of(settings)
        names = [name for name, tab in self.made.items() if tab.form.kind is type(request)]
        if not names:
            missing = "a decoder that draws from embeddings"
            if isinstance(request, Upsample):
                missing = "upsamplers"
            raise UserError(
                f'The settings are of "{settings["kind"]}", which this studio cannot do: start it '
                f"with {missing}."
            )
        name, form = names[0], self.made[names[0]].form
        form.models.check(request)
        settings = described(request)  # as it was understood
        values: list[Any] = []
        for tab in self.made.values():
            same = tab.form is form
            values += form.values(settings) if same else [gr.skip() for _ in tab.form.fields]
        text = f"The settings are in {name}."
        if set(PICTURES) & set(form.fields):
            text += " Give it the picture that it started from, which is not in the file."
        if lost := settings.keys() - form.fields.keys() - {"kind", "size"}:
            text += f" The page has no field for {', '.join(sorted(lost))}: only the API has."
        return [html.said(text), gr.Tabs(selected=name), *values]

    def refused(self, error: UserError) -> list[Any]:
        """A sentence; all else stays."""
        return [html.failed(str(error)), gr.skip(), *[gr.skip() for _ in self.components()]]


def picked(album: Album, request: gr.Request, path: str | None) -> Print:
    """The chosen picture; a UserError where there is none."""
    for one in album.of(str(request.session_hash)):
        if str(one.path) == path:
            return one
    raise UserError("No picture is chosen: choose one of yours.")


def wire_restoring(
    album: Album,
    made: Mapping[str, Tab],
    all_tabs: Any,
    chosen: Any,
    restore: Any,
    dropped: Any,
    said: Any,
) -> None:
    """The settings of the chosen picture, or of a file, fill the form of the tab that made it."""
    forms = Restoring(made)

    def of_chosen(request: gr.Request, path: str | None) -> list[Any]:
        try:
            return forms.filled(picked(album, request, path).settings)
        except UserError as error:
            return forms.refused(error)

    def of_file(data: bytes) -> list[Any]:
        try:
            return [None, *forms.filled(settings_in(data))]
        except UserError as error:
            return [None, *forms.refused(error)]

    outputs = [said, all_tabs, *forms.components()]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    restore.click(of_chosen, chosen, outputs, **quiet)
    dropped.upload(of_file, dropped, [dropped, *outputs], **quiet)
