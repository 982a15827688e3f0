"""What the library never does: run what it reads, use the network unasked, report to anyone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "medbudget").rglob("*.py"))

# ------------------------------------------------------------------------- a lint of our own

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "os.system",
    "os.popen", "yaml.load", "joblib.load", "torch.hub.load", "numpy.fromregex", "pd.read_pickle",
}  # fmt: skip


def find_dangers(text: str) -> list[str]:
    """Return what a source does that it must not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append("trust_remote_code")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN | FORBIDDEN_CALLS:
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append("allow_pickle")
        if options.get("shell", "False") != "False":
            found.append("shell=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_library_runs_nothing_that_it_reads(path):
    assert not find_dangers(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')", "exec(x)", "pickle.load(f)", "pickle.loads(b)", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "os.system('x')",
        "subprocess.run(c, shell=True)", "yaml.load(f)", "A.from_pretrained(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_lint_sees(line):
    assert find_dangers(line)


def test_only_one_module_unpickles_and_it_calls_nothing_by_name():
    named = [p.name for p in SOURCES if "pickle.Unpickler" in p.read_text(encoding="utf-8")]
    assert named == ["official.py"]


def test_every_constraint_is_one_exact_version():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+( ;.*)?", line), line


# ------------------------------------------------------------------------- network and telemetry


def test_dependencies_are_told_not_to_report():
    code = (
        "import json, os, medbudget; from huggingface_hub import constants as c;"
        "print(json.dumps([c.HF_HUB_DISABLE_TELEMETRY, os.environ['DO_NOT_TRACK'],"
        " os.environ['RAY_USAGE_STATS_ENABLED']]))"
    )
    plain = {k: v for k, v in os.environ.items() if not re.search("TRACK|TELEMETRY|USAGE", k)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, "1", "0"]


BLOCK = """
import os, socket

def _refuse(name):
    def refuse(*args, **options):
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{name} {args}\\n")
        raise OSError("the network is blocked in this test")
    return refuse

for _name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, _name, _refuse(_name))

class _Socket(socket.socket):
    def connect(self, address):
        if self.family == getattr(socket, "AF_UNIX", None):
            return super().connect(address)
        return _refuse("connect")(address)

    def connect_ex(self, address):
        return _refuse("connect_ex")(address)

socket.socket = _Socket
"""

PATH = """
import sys
from pathlib import Path
from medbudget import cli
def run(line):
    sys.argv = ["medbudget", *line.split()]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
for split in ("train", "val", "test"):
    for label in ("healthy", "tumour"):
        run(f"phantoms {split}/{label} --label {label} --n 4 --split {split}")
run("invert train/tumour --token <x> --out x.pt --steps 2 --n-vectors 2 --samples 1")
run("sample <x> --embeddings x.pt --out made --n 2 --steps 2")
run("inpaint train/healthy <x> --ellipse .5,.5,.2,.2 --embeddings x.pt --out painted --steps 2")
run("evaluate test/tumour made --out scores.json")
run("classify train val test --runs 1 --steps 2 --preset tiny --weights none --out classified")
run("embedding convert x.pt x.safetensors")
run("describe made")
run("doctor")
print("done")
"""


def blocked(tmp_path, code, *command):
    """Run code with sockets that refuse; return its output and what it tried."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    log = tmp_path / "network.log"
    log.touch()
    dropped = re.compile("HF_|TRANSFORMERS_|MALLOC_|DO_NOT_TRACK")
    plain = {k: v for k, v in os.environ.items() if not dropped.match(k)}
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        env={
            **plain,
            "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT))),
            "NETWORK_LOG": str(log),
            "MEDBUDGET_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "hf"),
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    return done, log.read_text(encoding="utf-8")


def test_the_block_is_a_block(tmp_path):
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    done, tried = blocked(tmp_path, code)
    assert "the network is blocked" in done.stderr and "create_connection" in tried


@pytest.mark.slow
def test_the_whole_tiny_path_uses_no_network(tmp_path):
    unshare = shutil.which("unshare")
    command = [unshare, "--net", "--map-root-user"] if unshare else []
    if unshare and subprocess.run([*command, "true"], capture_output=True).returncode:
        command = []  # not permitted here: the patched sockets have to do
    done, tried = blocked(tmp_path, PATH, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("done") and not tried
    assert len(list((tmp_path / "made").glob("0*.png"))) == 2
