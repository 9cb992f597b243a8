"""Log in to Flower at both of its doors and print how many workers it names.

Arguments: the HTTPS port of this machine, the file with the CA, the port without TLS; CREDENTIALS is USER:PASSWORD.
"""

import base64
import json
import os
import ssl
import sys
import urllib.request

https_port, ca, development_port = sys.argv[1:]
login = "Basic " + base64.b64encode(os.environ["CREDENTIALS"].encode()).decode()
trust = ssl.create_default_context(cafile=ca)


def get(url: str) -> bytes:
    """Return what `url` answers to the login. Ends the program with the reason if it does not answer 200."""
    request = urllib.request.Request(url, headers={"Authorization": login})
    try:
        with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
            return answer.read()
    except OSError as error:
        sys.exit(f"{url}: {error}")


get(f"http://localhost:{development_port}/")
print(len(json.loads(get(f"https://localhost:{https_port}/flower/api/workers"))))
