"""Exits with 0 if the server of this container accepts requests, with 1 if it does not.

It asks the server itself, whatever proxy the environment names.
"""

import http.client
import os
import sys

EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
TIMEOUT_S = 4


def main() -> int:
    """Asks `/readyz`; returns the status of the process."""
    host = os.environ.get("WEFT_HOST", "127.0.0.1")
    port = int(os.environ.get("WEFT_PORT", "8000"))
    connection = http.client.HTTPConnection(EVERY_ADDRESS.get(host, host), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return int(connection.getresponse().status != http.client.OK)
    except (OSError, http.client.HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main())
