"""Exits with 0 if the server of this container accepts requests, with 1 and the reason if not.

The server is contacted directly, without any proxy that the environment names.
"""

import http.client
import os
import sys

EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
TIMEOUT_S = 4
MAX_BODY_BYTES = 1000


def main() -> str | None:
    """Requests `/readyz`; returns the reason if the server is not ready, for `docker inspect`."""
    host = os.environ.get("WEFT_HOST", "127.0.0.1")
    port = int(os.environ.get("WEFT_PORT", "8000"))
    connection = http.client.HTTPConnection(EVERY_ADDRESS.get(host, host), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        if answer.status == http.client.OK:
            return None
        told = answer.read(MAX_BODY_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"/readyz does not answer: {error}"
    return f"/readyz answers {answer.status}: {told}"


if __name__ == "__main__":
    sys.exit(main())
