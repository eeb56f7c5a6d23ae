"""A stand-in for the `curl` program on machines without it: the same libcurl, from the wheel `pycurl`, and as many of
the program's options as the tests use."""

from __future__ import annotations

import argparse
import signal
import sys

import pycurl


def main() -> int:
    """Behave as `curl` does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for libcurl to return
    parser = argparse.ArgumentParser()
    parser.add_argument("-q", action="store_true")
    parser.add_argument("-N", action="store_true")
    parser.add_argument("-s", action="store_true")
    parser.add_argument("-i", action="store_true")
    parser.add_argument("-I", action="store_true")
    parser.add_argument("--http1.0", dest="old", action="store_true")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d", default=None)
    parser.add_argument("--data-binary", dest="file", default=None)
    parser.add_argument("urls", nargs="+")
    options = parser.parse_args()

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    curl = pycurl.Curl()
    curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_0 if options.old else pycurl.CURL_HTTP_VERSION_1_1)
    curl.setopt(pycurl.HTTPHEADER, options.H)
    curl.setopt(pycurl.USERAGENT, "curl/pycurl")
    curl.setopt(pycurl.WRITEFUNCTION, write)
    if options.i or options.I:
        curl.setopt(pycurl.HEADERFUNCTION, write)
    if options.I:
        curl.setopt(pycurl.NOBODY, 1)
    if options.file is not None:
        with open(options.file.removeprefix("@"), "rb") as file:
            curl.setopt(pycurl.COPYPOSTFIELDS, file.read())
    elif options.d is not None:
        curl.setopt(pycurl.COPYPOSTFIELDS, options.d)
    for url in options.urls:
        curl.setopt(pycurl.URL, url)
        try:
            curl.perform()
        except pycurl.error as error:
            return int(error.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
