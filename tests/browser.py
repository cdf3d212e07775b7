"""Headless Chromium, driven over its DevTools protocol: a test can click, type, hover and read the page with it.

with Browser(folder) as browser:
    browser.open(path)
    browser.click("#list .row")
    assert browser.errors == []
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

DEADLINE = 120  # seconds: ten times what a slow machine takes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    def __init__(self, folder, width=1400, height=900):
        """Start Chromium with a profile in this folder, and open an empty page of this size in pixels."""
        from websockets.sync.client import connect

        profile = Path(folder) / "profile"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        command += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars", "about:blank"]
        with open(Path(folder) / "chromium.log", "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        port_file = profile / "DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text().count("\n"), "Chromium's port")
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=DEADLINE) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        address = pages[0]["webSocketDebuggerUrl"]
        self.connection = connect(address, max_size=None, open_timeout=DEADLINE)
        self.socket = self.connection.__enter__()
        self.ids = itertools.count(1)
        self.errors = []  # exceptions, and what the page wrote to the console
        self.requests = []  # addresses that the page requested
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.__exit__(None, None, None)
        self.process.terminate()
        self.process.wait(DEADLINE)

    def send(self, method, **parameters):
        """Call a method of the protocol and return its result; note what the page reports meanwhile."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=DEADLINE))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.note(message)

    def note(self, message):
        method, parameters = message.get("method"), message.get("params")
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append([argument.get("value") for argument in parameters["args"]])
        elif method == "Log.entryAdded":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def run(self, expression):
        """Evaluate a JavaScript expression and return its value; a promise is awaited."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        result = self.send("Runtime.evaluate", **options)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression):
        """Wait until the expression is true."""
        wait_for(lambda: self.run(expression), expression)

    def open(self, path, fragment=""):
        self.send("Page.navigate", url=Path(path).resolve().as_uri() + fragment)
        self.wait("typeof page !== 'undefined' && page.ready")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector):
        """The number of elements that match the selector."""
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def middle(self, selector, place=0):
        """Scroll the matching element number `place`, from 0, into view; return its middle, x and y in pixels."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{place}]"
        box = f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'nearest'}}); const b = e.getClientRects()[0];"
        return self.run(box + " return [b.x + b.width / 2, b.y + b.height / 2]; })()")

    def move(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def hover(self, selector, place=0):
        self.move(*self.middle(selector, place))

    def click(self, selector, place=0):
        x, y = self.middle(selector, place)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector, text):
        """Click into a field and type the text."""
        self.click(selector)
        self.send("Input.insertText", text=text)

    def choose(self, selector, value):
        """Choose an option of a select element, and fire its change event, as a person's choice does."""
        found = f"document.querySelector({json.dumps(selector)})"
        event = "new Event('change', {bubbles: true})"
        self.run(f"{found}.value = {json.dumps(value)}; {found}.dispatchEvent({event}); {found}.value")

    def picture(self, path):
        """Write a screenshot as a PNG file."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE} s"
        time.sleep(0.05)
