"""The page that runs networks in the browser, in headless Chromium where it is installed."""

import functools
import html
import http.server
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import bonn_qat

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("ziglang")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DEMO = Path(__file__).parents[2] / "docs" / "demo"
PROBE = """<!doctype html><body><script type="module">
import { load } from "./nets/net_binary.js";
const net = await load(), images = new Float32Array(await (await fetch("images")).arrayBuffer());
await fetch("/told", { method: "POST", body: JSON.stringify([...net(images)]) });
</script>"""
# Sends the page when it shows its last part.
TELL = """<script type="module">
while (document.getElementById("inside").hidden) await new Promise((resolve) => setTimeout(resolve, 50));
await fetch("/told", { method: "POST", body: document.body.innerHTML });
</script></body>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The demo with its networks, on a server; a picture of 32 x 32 pixels is in the place of the cat."""
    folder = tmp_path_factory.mktemp("site") / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("nets"))
    spec = importlib.util.spec_from_file_location("make", DEMO / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    make.picture = lambda path: PIL.fromarray(pixels).save(path)
    make.make(folder / "nets")
    index = folder / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace("</body>", TELL), encoding="utf-8")
    told: queue.Queue[str] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def shown(page, profile):
            """What the scripts of a page send."""
            command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
            address = f"http://127.0.0.1:{server.server_port}/{page}"
            with subprocess.Popen([*command, address], stderr=subprocess.DEVNULL, start_new_session=True) as browser:
                try:
                    return told.get(timeout=120)
                finally:
                    os.killpg(browser.pid, signal.SIGKILL)

        yield folder, shown, pixels
        server.shutdown()


@torch.no_grad()
def test_logits_in_the_browser_are_those_of_python(site, tmp_path):
    folder, shown, _ = site
    images = torch.randn(20, 3, 32, 32)
    (folder / "images").write_bytes(images.numpy().tobytes())
    (folder / "probe.html").write_text(PROBE)
    found = torch.tensor(json.loads(shown("probe.html", tmp_path))).view(20, 10)
    packed = bonn_qat.pack(bonn_qat.create_model("wrn22_16.bonn_cifar10", pretrained=True).eval())
    assert torch.equal(found, packed(images))


@torch.no_grad()
def test_the_page_shows_what_the_network_says_of_a_picture(site, tmp_path):
    folder, shown, pixels = site
    page = shown("index.html", tmp_path)
    rows = re.search(r'<article class="network binary">.*?</article>', page, re.DOTALL)[0]
    told = re.findall(
        r"<span>([^<]*)</span><span><i[^>]*></i></span><span>([\d.]+) %</span>", re.sub(' class=""', "", rows)
    )
    facts = json.loads((folder / "nets" / "nets.json").read_text())
    mean, std = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "std"))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    chances = bonn_qat.create_model("wrn22_16.bonn_cifar10", pretrained=True).eval()(image[None])[0].softmax(0)
    best = chances.topk(5)
    assert [html.unescape(name) for name, _ in told] == [facts["labels"][i] for i in best.indices]
    np.testing.assert_allclose([float(share) for _, share in told], 100 * best.values, atol=0.06)
