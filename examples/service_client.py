"""A client of the service that shows a text while it is being written (server-sent events); standard library only.

    gavamoe serve runs/own_reviews                                    # in another terminal
    python examples/service_client.py --user U000001 --item I000001

The address is --url or GAVAMOE_URL, the API key --key or GAVAMOE_KEY; a service without keys needs none.
Prints the route, the text word by word, and how long it took.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def events(url: str, key: str | None, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event: one `route`, many `token`, and last `done` or `error`."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = Request(f"{url}/v1/explain", json.dumps(body | {"stream": True}).encode(), headers)
    with urlopen(request, timeout=60) as response:
        name = ""
        for line in response:  # an event is a line with its name, a line with its data, and an empty line
            field, _, value = line.decode("utf-8").rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--user", required=True)
    parser.add_argument("--item", required=True)
    parser.add_argument("--url", default=os.environ.get("GAVAMOE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--key", default=os.environ.get("GAVAMOE_KEY"))
    options = parser.parse_args(arguments)
    name, data = "", dict[str, Any]()
    try:
        for name, data in events(options.url, options.key, {"user": options.user, "item": options.item}):
            if name == "route":
                print(f"cluster {data['cluster']}, predicted rating {data['predicted_rating']:.1f}")
            elif name == "token":
                print(data["text"], end="", flush=True)
    except HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['error']['message']}")
    except URLError as error:
        sys.exit(f"{options.url}: {error.reason}")
    if name != "done":
        sys.exit(f"\nthe text broke off: {data['error']['message'] if name == 'error' else 'connection lost'}")
    print(f"\n{data['new_tokens']} tokens in {data['timings_ms']['total']:.0f} ms")
