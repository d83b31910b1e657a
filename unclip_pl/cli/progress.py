"""Progress bars of what draws, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


class DrawingBar:
    """The sampling steps of all pictures of a command, and how many pictures are done.

    Args:
        steps: of all stages and batches together.
        pictures: how many there will be.
    """

    def __init__(self, steps: int, pictures: int) -> None:
        from tqdm import tqdm

        self.pictures, self.done = pictures, 0
        self._bar = tqdm(total=steps, unit="step", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, stage: str, step: int, steps: int) -> None:
        """One step more; `UnCLIP.generate` and `Cascade.upsample` call it."""
        text = f"{self.done} of {self.pictures} pictures, {stage} step {step}/{steps}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def add(self, path: object) -> None:
        """A picture is done: its path goes to stdout."""
        self.done += 1
        self._bar.set_postfix_str(f"{self.done} of {self.pictures} pictures", refresh=False)
        self._bar.write(str(path), file=sys.stdout)


@contextmanager
def step_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of one sampler's steps, as a callback with (step, steps)."""
    from tqdm import tqdm

    with tqdm(desc=description, unit="step", file=sys.stderr) as bar:

        def callback(step: int, steps: int) -> None:
            if step < bar.n:  # the sampler starts again
                bar.reset(steps)
            bar.total = steps
            bar.update(step - bar.n)

        yield callback
