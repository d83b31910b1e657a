"""Tar shards of images and captions, as img2dataset and webdataset write them.

A sample is KEY.jpg|png|webp, KEY.txt and KEY.json.

Nothing in a shard is ever unpickled: only the endings named in `data.tars` are read. What cannot be
used is named, counted and skipped, up to a share of the samples (`BadSampleCounter`). This includes
a second sample of the same key in a shard, because images and embeddings are paired by key, and an
image of more than 50 megapixels, which would stall a worker and take a GB. A JPEG counts as large
as it is decoded (`decode`).
"""

import os
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any

from unclip_pl.data.bad_samples import (
    BadSample,
    BadSampleCounter,
    SkippedSamples,
    too_many_files,
)
from unclip_pl.data.captions import caption_of
from unclip_pl.data.decoding import IMAGE_ENDINGS, decode
from unclip_pl.data.names import is_streamed, open_shard
from unclip_pl.data.tars import SampleFiles, SampleGrouper, SpecialFile, tar_files, tar_names
from unclip_pl.utils.errors import UserError


def raw_samples(
    url: str, counter: BadSampleCounter, members: Collection[str] = (), whole: bool = False
) -> Iterator[dict[str, Any]]:
    """The samples of a shard in the tar's order, not decoded; bad ones are counted at once.

    Args:
        url: the shard's name.
        counter: counts the bad ones.
        members: further endings to read, such as "img_emb.npy", in small letters.
        whole: a command (`pipe:`) that breaks off is a UserError. Unlike a damaged file its output
            may well be whole the next time, and nothing here would tell.

    Yields:
        `key`, `shard`, `image` (bytes), `caption` (str), `endings` (of all files with its key),
        and with `members` also `members`: the bytes of those that are there.
    """
    for sample in read_shard(url, counter, members, whole):
        if isinstance(sample, SkippedSamples):
            counter.record_skipped(sample)
        else:
            yield sample


def read_shard(
    url: str, counter: BadSampleCounter, members: Collection[str] = (), whole: bool = False
) -> Iterator[dict[str, Any] | SkippedSamples]:
    """Yield what `raw_samples` does, and as `SkippedSamples` also what cannot be used.

    Nothing is counted here. `counter` only learns how large shards are, and which files in them are
    not used.

    Raises:
        UserError: the shard is gone, an object cannot be read, or, with `whole`, a command breaks
            off.
    """
    read, rest = 0, 0
    keys: set[str] = set()
    grouper = SampleGrouper(url, members)
    try:
        with open_shard(url) as stream:
            try:
                for group in grouper.samples(tar_files(stream)):
                    if isinstance(group, SkippedSamples):
                        yield group
                        continue
                    read += 1
                    try:
                        sample = _sample(group, url, keys, members)
                    except BadSample as error:
                        yield SkippedSamples(f"sample {group.key} of {url}", error)
                        continue
                    keys.add(group.key)
                    yield sample
            except Exception:
                rest = 0 if is_streamed(url) else _estimate_rest(stream, read)
                raise
    except FileNotFoundError:
        raise _gone(url) from None
    except UserError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged files
        if limit := too_many_files(error):
            raise limit from None
        if whole and is_streamed(url):
            raise UserError(
                f"The shard {url} broke off after {read} samples ({_cause(error)}): run again, "
                "finished shards are kept; if it ends there each time, mend it."
            ) from None
        where = f"the rest of shard {url}, after {read} samples,"
        reason = f"it is no whole tar ({_cause(error)})"
        yield SkippedSamples(where, reason, counter.record_broken_shard(read, rest))
    counter.report_unused(url, grouper.unused)
    if more := counter.record_shard_size(read):
        reason = f"{url} shows that they had at least {read} samples"
        yield SkippedSamples("the rest of broken shards before", reason, more)


def _sample(
    group: SampleFiles, url: str, keys: set[str], members: Collection[str]
) -> dict[str, Any]:
    if group.image is None:
        if group.key in keys:
            cure = "write the files of a sample one after the other (tar --sort=name)"
            raise BadSample(f"its {', '.join(group.files)} lies apart from its image: {cure}")
        raise BadSample(f"it has no image ({', '.join(IMAGE_ENDINGS)})")
    if group.key in keys:
        raise BadSample("an earlier sample of the shard has the same key")
    files: dict[str, bytes] = {}
    for ending, content in group.files.items():
        if isinstance(content, SpecialFile):
            raise BadSample(f"its .{ending} {content.why}")
        files[ending] = content
    sample: dict[str, Any] = {
        "key": group.key,
        "shard": url,
        "image": files[group.image],
        "caption": caption_of(files),
        "endings": group.endings,
    }
    if members:
        sample["members"] = {name: files[name] for name in members if name in files}
    return sample


def _estimate_rest(stream: IO[bytes], read: int) -> int:
    """Estimate how many samples the bytes after the damage hold; 0 where the file is cut there.

    The samples before the damage show how many bytes one has.
    """
    position = stream.tell()
    if not position:
        return 0
    size = stream.seek(0, os.SEEK_END)
    return round(read * (size / position - 1))


def _gone(shard: str) -> UserError:
    cure = "put it back, or take it out of data.train and data.val"
    return UserError(f"The shard {shard} is gone: {cure}.")


def _cause(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def decode_batches(
    shard: str, image_size: int, batch_size: int, counter: BadSampleCounter
) -> Iterator[list[dict[str, Any]]]:
    """Batches of decoded samples, in the tar's order.

    Samples are those of `raw_samples`, with `image` float32 (3, S, S) in [-1, 1] and `bytes`, its
    size in the tar. The next two batches are decoded by threads while one is used. What
    cannot be used is counted after its batch was yielded, so that the caller has counted the good
    ones first.

    Raises:
        UserError: the shard is gone or cannot be read, a command breaks off, or there are too many
            bad samples.
    """

    def decode_sample(sample: dict[str, Any]) -> dict[str, Any] | SkippedSamples:
        data = sample["image"]
        try:
            return sample | {"image": decode(data, image_size), "bytes": len(data)}
        except BadSample as error:
            return SkippedSamples(f"sample {sample['key']} of {shard}", error)

    stream = read_shard(shard, counter, whole=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:

        def submit(sample: dict[str, Any] | SkippedSamples) -> Future | SkippedSamples:
            if isinstance(sample, SkippedSamples):
                return sample
            return threads.submit(decode_sample, sample)

        coming: deque[list[Future | SkippedSamples]] = deque()
        while True:
            while len(coming) < 3 and (samples := list(islice(stream, batch_size))):
                coming.append([submit(sample) for sample in samples])
            if not coming:
                return
            results = [
                task if isinstance(task, SkippedSamples) else task.result()
                for task in coming.popleft()
            ]
            if batch := [result for result in results if not isinstance(result, SkippedSamples)]:
                yield batch
            for result in results:
                if isinstance(result, SkippedSamples):
                    counter.record_skipped(result)


def count_samples(shard: str) -> int:
    """Number of samples with an image in a shard.

    Only the tar's headers are read; the output of a command (`pipe:`) is read through.

    Raises:
        UserError: it is no whole tar.
    """
    try:
        with open_shard(shard) as stream:
            if is_streamed(shard):
                return _count_with_image(shard, tar_files(stream))
            return _count_with_image(shard, tar_names(stream))
    except UserError:
        raise
    except FileNotFoundError:
        raise _gone(shard) from None
    except Exception as error:
        raise UserError(
            f"The shard {shard} is no whole tar ({_cause(error)}): fetch it again, take it out, or "
            "set data.loader.steps_per_epoch."
        ) from None


def _count_with_image(shard: str, files: Iterator) -> int:
    groups = SampleGrouper(shard).samples(files)
    return len({group.key for group in groups if isinstance(group, SampleFiles) and group.image})
