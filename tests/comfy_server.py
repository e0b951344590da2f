"""A real, headless ComfyUI for tests: folders of its own, this pack and the stand-ins, prompts over HTTP."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy_host
from PIL import Image, ImageDraw

STANDINS = Path(__file__).parent / "standins"
READY_S, POLL_S = 240, 0.25
PICTURE = "example.png"


@dataclass(frozen=True)
class Server:
    url: str
    base: Path
    pid: int

    def cpu_seconds(self) -> float:
        """What it has computed so far, on however busy a machine."""
        import psutil  # ComfyUI needs it too

        used = psutil.Process(self.pid).cpu_times()
        return float(used.user + used.system)

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, value: Any) -> Any:
        """The answer; ComfyUI's complaint as a ValueError."""
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise ValueError(f"{path} was refused: {error.read().decode()[:3000]}") from error

    def execute(self, api: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """Outputs by node; an error of a node as a ValueError."""
        key = self.post("/prompt", {"prompt": api})["prompt_id"]
        began = time.monotonic()
        while key not in (history := self.get(f"/history/{key}")):
            if time.monotonic() - began > timeout_s:
                self.post("/interrupt", {})
                raise ValueError(f"the graph did not end within {timeout_s:g} s")
            time.sleep(POLL_S)
        status = history[key]["status"]
        if status["status_str"] != "success":
            said = [m[1] for m in status["messages"] if m[0] in ("execution_error", "execution_interrupted")]
            text = "; ".join(f"{m.get('node_type')} {m.get('node_id')}: {m.get('exception_message')}" for m in said)
            raise ValueError(f"the graph failed: {text or status}")
        found: dict[str, Any] = history[key]["outputs"]
        return found

    def picture(self, shown: dict[str, str]) -> Path:
        """Where an image of an output lies."""
        return self.base / shown["type"] / shown["subfolder"] / shown["filename"]


@contextmanager
def serving(base: Path, *flags: str, packs: Sequence[str] = ("ComfyUI-DMD",)) -> Iterator[Server]:
    """ComfyUI with all its folders below `base`; packs: folders that this pack is in."""
    root = comfy_host.comfy_path()
    if root is None:
        raise ValueError(comfy_host.missing())
    if not (base / "custom_nodes").exists():  # else it is started again
        (base / "custom_nodes").mkdir(parents=True)
        for pack in packs:
            (base / "custom_nodes" / pack).symlink_to(comfy_host.PACK, target_is_directory=True)
        (base / "custom_nodes" / "standins").symlink_to(STANDINS, target_is_directory=True)
        (base / "input").mkdir(exist_ok=True)
        holed_picture().save(base / "input" / PICTURE)
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DMD_STANDINS": "1",
    }
    command = [
        comfy_host.comfy_python(root), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(base), "--database-url", f"sqlite:///{base}/comfy.db", "--disable-api-nodes",
        "--use-pytorch-cross-attention", *flags,
    ]  # fmt: skip
    with open(base / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Server(f"http://127.0.0.1:{port}", base, process.pid)
        wait_for(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def name_files(base: Path, models: dict[str, dict[str, str]]) -> None:
    """Empty files of these names: all that a graph needs to be opened, and nothing to run it with."""
    for file, model in models.items():
        path = base / "models" / model["directory"] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def wait_for(server: Server, process: "subprocess.Popen[bytes]") -> None:
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < READY_S:
        try:
            server.get("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(POLL_S)
    raise RuntimeError(f"ComfyUI did not start:\n{server.log[-4000:]}")


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def holed_picture(side: int = 512) -> Image.Image:
    """A photograph's stand-in: a smooth ramp with a transparent hole, which LoadImage gives as the mask."""
    ramp = Image.linear_gradient("L").resize((side, side))
    picture = Image.merge("RGBA", (ramp, ramp.rotate(90), ramp.rotate(180), Image.new("L", (side, side), 255)))
    ImageDraw.Draw(picture).rectangle((160, 160, 287, 287), fill=(0, 0, 0, 0))
    return picture
