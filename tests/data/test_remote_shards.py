"""Shards that lie on a server or in a bucket."""

import functools
import http.server
import itertools
import threading

import pytest

from tests.data.loaderkit import keys_of, loader, take
from tests.data.shardkit import write_shards
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.names import expand
from unclip_pl.data.shards import count_samples
from unclip_pl.utils.errors import UserError


@pytest.fixture
def server(tmp_path):
    """(address, folder) of a web server on this machine."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_come_over_http_by_a_brace_pattern(server, workers):
    address, folder = server
    here = write_shards(folder, [9, 4, 12])
    there = expand(f"{address}/{{00000..00002}}.tar")
    assert list(map(count_samples, there)) == [9, 4, 12]
    assert [keys_of(shard, BadSampleCounter(0)) for shard in there] == [
        keys_of(shard, BadSampleCounter(0)) for shard in here
    ]
    assert (
        sorted(itertools.chain(*take(loader(there, steps=6, num_workers=workers), 6)))[-1]
        <= "000024"
    )
    missing = f"{address}/00003.tar"
    for read in (lambda shard: keys_of(shard, BadSampleCounter(1.0)), count_samples):
        with pytest.raises(UserError, match=rf"{missing} is gone"):
            read(missing)


def test_shards_in_s3_come_through_the_command_that_fetches_them(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    shards = write_shards(tmp_path / "bucket", [9, 4])
    aws = tmp_path / "aws"
    aws.write_text(
        f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{tmp_path}/${{3#s3://}}"\nexit 9\n'
    )
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError) as error:
        expand("rados://bucket/00000.tar")
    assert "can read rados://bucket/00000.tar: name a command" in str(error.value)
    urls = expand("pipe:aws s3 cp s3://bucket/{00000..00001}.tar -")
    assert [keys_of(url, BadSampleCounter(0)) for url in urls] == [
        keys_of(shard, BadSampleCounter(0)) for shard in shards
    ]
