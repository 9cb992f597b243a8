"""Print how many workers Flower's API names. Arguments: URL, file with the CA; CREDENTIALS is USER:PASSWORD."""

import base64
import json
import os
import ssl
import sys
import urllib.error
import urllib.request

url, ca = sys.argv[1:]
login = base64.b64encode(os.environ["CREDENTIALS"].encode()).decode()
request = urllib.request.Request(url, headers={"Authorization": f"Basic {login}"})
try:
    with urllib.request.urlopen(request, timeout=30, context=ssl.create_default_context(cafile=ca)) as answer:
        print(len(json.load(answer)))
except (OSError, urllib.error.URLError) as error:
    sys.exit(f"{url}: {error}")
