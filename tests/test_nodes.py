"""Two hosts on one machine: two network namespaces with a Ray node in each, and what may go wrong between them.

As the README says, `ray start --head` runs in one and `ray start --address=…` in the other, with the same token, and then
`python launch.py` on the first. The hosts share the project's folder and runs/, as real ones must. A host fails as a
machine does: everything in its namespace is killed at once. These tests need root and `ip netns`.
"""

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import test_resume
from test_launch import ROOT, check_exports, finish, wait_for_step
from test_launch import run as run_here
from test_resume import check_same

pytestmark = pytest.mark.soak
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6399
STEPS = 4
RUN = [*test_resume.RUN, f"--steps={STEPS}", "--name=a"]  # of a repeated setting the last one counts


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with an address of its own, and the Ray node in it."""

    def __init__(self, name, address, environment):
        self.name, self.address, self.environment = name, address, environment
        self.temp = tempfile.mkdtemp(prefix="nodes_")  # a short path, since those of sockets are limited
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")

    def popen(self, command, prepare="true", **how):
        """Start `command` in this host; `prepare` may mount what only the command and its children will see."""
        command = ["ip", "netns", "exec", self.name, "sh", "-c", f'{prepare} && exec "$@"', "-", *command]
        pipe = subprocess.PIPE
        environment = self.environment | how
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)

    def join(self, head=None, prepare="true", ray=(RAY,)):
        """Start the Ray node: the first one of a cluster, or one more of the cluster of `head`. Returns exit code,
        stdout and stderr."""
        where = [f"--address={head.address}:{PORT}"] if head else ["--head", f"--port={PORT}"]
        if not head:
            where.append("--include-dashboard=false")
        command = [*ray, "start", *where, f"--node-ip-address={self.address}", "--num-cpus=1", "--num-gpus=0"]
        command += [f"--temp-dir={self.temp}", "--object-store-memory=200000000", "--disable-usage-stats"]
        return finish(self.popen(command, prepare))

    def processes(self):
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)

    def die(self):
        """End as a machine does that loses power."""
        while found := list(self.processes()):
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)

    def remove(self):
        self.die()
        ip("netns", "del", self.name)
        shutil.rmtree(self.temp, ignore_errors=True)


def possible():
    """None, or the reason why there cannot be two hosts here."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "needs root and iproute2"
    probe = f"nodes{os.getpid()}"
    for command in (["netns", "add", probe], ["netns", "exec", probe, "true"], ["netns", "del", probe]):
        done = subprocess.run(["ip", *command], capture_output=True, text=True)
        if done.returncode != 0:
            return f"no network namespaces: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def hosts():
    """The head with its Ray node, and a second host that has none yet."""
    if reason := possible():
        pytest.skip(reason)
    number = os.getpid() % 250  # two test runs at once do not meet: a veth pair leads nowhere else
    head, other = f"10.211.{number}.1", f"10.211.{number}.2"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": f"{head}:{PORT}"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with contextlib.ExitStack() as stack:
        pair = []
        for letter, address in (("a", head), ("b", other)):
            own = {"NCCL_SOCKET_IFNAME": f"eth7_of_{letter}"}  # this may differ from node to node
            pair.append(Host(f"nodes{os.getpid()}{letter}", address, environment | own))
            stack.callback(pair[-1].remove)
        names = [host.name for host in pair]
        ip(
            "link",
            "add",
            "eth7",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth7",
            "netns",
            names[1],
        )
        for host in pair:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth7")
            ip("-n", host.name, "link", "set", "eth7", "up")
        code, out, err = pair[0].join()
        assert code == 0, out + err
        yield pair


@pytest.fixture
def both(hosts):
    """Both hosts with a Ray node each; the second one's ends with the test."""
    head, other = hosts
    join(other, head)
    yield head, other
    other.die()


def join(other, head, prepare="true"):
    code, out, err = other.join(head, prepare)
    assert code == 0, out + err


def start(head, folder, *arguments, program=("launch.py",)):
    """The run, as a person starts it on the head."""
    return head.popen([sys.executable, *program, "configs/tiny.py", f"--out_dir={folder}", *RUN, *arguments])


def workers_of(host):
    found = []
    for process in host.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and "ray::Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def check_end(hosts, process, code, *expected):
    """The exit code and the words of the last line are as expected, there is no traceback, and nothing of the run is
    left in any host a minute later. Returns stdout."""
    ended, out, err = finish(process)
    last = (err if ended == 2 else out).strip().splitlines()[-1]
    print(last)
    assert ended == code and last.startswith("error: "), out + err
    assert all(word in last for word in expected) and "Traceback" not in out + err, out + err
    check_nothing_left(hosts)
    return out


def check_nothing_left(hosts):
    """Only Ray itself is running: no Worker, nothing that a Worker started, no driver."""
    deadline = time.monotonic() + 60
    while True:
        left = []
        for process in [process for host in hosts for process in host.processes()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if (
                    line
                    and "ray::IDLE" not in line
                    and ("/ray/" not in line and "ray::" not in line and "ray." not in line)
                ):
                    left.append(line)
                left += [line] if "ray::Worker" in line else []
        if not left or time.monotonic() > deadline:
            assert not left
            return
        time.sleep(1)


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    code, out, err = run_here(folder, *RUN)
    assert code == 0, out + err
    return folder / "a"


def test_a_node_too_few(hosts, tmp_path):
    """Guards against waiting for a machine that nobody has joined."""
    check_end(hosts, start(hosts[0], tmp_path), 2, "workers=2", "Ray has 1 CPUs")
    assert not (tmp_path / "a").exists()


def test_half_the_workers_on_each(both, tmp_path, on_one_node):
    """Guards runs on several machines: with one Worker on each, they learn what one machine would have learned."""
    command = [sys.executable, "launch.py", "configs/tiny.py", f"--out_dir={tmp_path}", *RUN]
    process = both[0].popen(command, NCCL_DEBUG="INFO", NCCL_SOCKET_IFNAME="eth7_of_the_driver")
    wait_for_step(process, tmp_path / "a", 1)
    assert [len(workers_of(host)) for host in both] == [1, 1]
    for host in both:
        # What was set before `ray start` on a node reaches its Workers; what is set where launch.py runs does not.
        environment = workers_of(host)[0].environ()
        assert environment["NCCL_SOCKET_IFNAME"] == host.environment["NCCL_SOCKET_IFNAME"]
        assert "NCCL_DEBUG" not in environment
    code, out, err = finish(process)
    assert code == 0 and f"joined the Ray cluster at {both[0].address}:{PORT}" in out, out + err
    assert f"step_{STEPS}" in os.listdir(tmp_path / "a/checkpoints")
    check_exports(tmp_path / "a")
    check_nothing_left(both)
    check_same(tmp_path / "a", on_one_node)


def test_a_node_that_leaves_and_comes_back(both, tmp_path, on_one_node):
    """Guards a month's work: the run names the node and asks for it; when it is back, the run continues where it
    was."""
    head, other = both
    process = start(head, tmp_path)
    wait_for_step(process, tmp_path / "a", 2)  # so that there is a checkpoint
    other.die()
    out = check_end(both, process, 2, "workers=2", "Ray has 1 CPUs")
    death = next(line for line in out.splitlines() if line.startswith("error: "))
    assert "Actor" in death and other.address in death, death
    assert "\nrestart 1 of " in out
    steps = max(int(name[5:]) for name in os.listdir(tmp_path / "a/checkpoints") if not name.endswith(".tmp"))
    join(other, head)
    code, out, err = finish(start(head, tmp_path))
    assert code == 0 and f"from step {steps + 1}" in out, out + err
    check_same(tmp_path / "a", on_one_node)


PORT_OF_RANK_0 = 29999
FIXED_PORT = f"""
import sys, launch, workers

class Fixed(workers.Worker):
    def address(self):
        return super().address()[0], {PORT_OF_RANK_0}

workers.Worker = Fixed
sys.exit(launch.main(sys.argv[1:]))
"""


def test_a_firewall_between_the_workers(both, tmp_path):
    """Guards against hanging if Ray's ports are open and the Workers' are not."""
    rule = f"ip rule add pref 10 lookup local; ip rule del pref 0; ip rule add pref 1 ipproto tcp dport {PORT_OF_RANK_0} "
    for host in both:  # rank 0 may be on either
        assert host.popen(["true"], f"({rule} iif eth7 blackhole)").wait() == 0
    try:
        program = ("-c", FIXED_PORT)
        process = start(both[0], tmp_path, "--phase_timeout=15", "--max_restarts=0", program=program)
        late = [f" at {host.address}" for host in both]  # rank 0 may be on either
        check_end(both, process, 75, "PhaseTimeout", "setup", "phase_timeout=15", "rank 0 at", *late)
    finally:
        for host in both:
            ip("-n", host.name, "rule", "del", "pref", "1")


def test_a_port_where_nobody_listens(both, tmp_path):
    """Guards the newcomer who names the wrong port or host: Ray alone would wait for minutes."""
    head, other = both
    for address in (f"{head.address}:{PORT + 1}", f"{other.address}:{PORT}"):
        command = [sys.executable, "launch.py", "configs/tiny.py", f"--out_dir={tmp_path}", *RUN]
        process = head.popen(command, RAY_ADDRESS=address)
        check_end(both, process, 2, address, "refused", "RAY_ADDRESS=local")


def test_a_node_without_the_shared_folder(hosts, tmp_path):
    """Guards against checkpoints of which each node keeps a part on its own disk."""
    head, other = hosts
    join(other, head, prepare=f"mount -t tmpfs none {tmp_path}")
    try:
        check_end(hosts, start(head, tmp_path), 1, f"node {other.address} does not see {tmp_path}")
    finally:
        other.die()


def test_a_node_with_other_packages(hosts, tmp_path):
    """Guards against Workers that compute with other package versions than the first node's: nobody could repeat such
    a run."""
    head, other = hosts
    found = importlib.metadata.distribution("rich")
    metadata = found.locate_file(f"rich-{found.version}.dist-info/METADATA")
    (tmp_path / "METADATA").write_text(
        metadata.read_text().replace(f"Version: {found.version}", "Version: 1.0")
    )
    join(other, head, prepare=f"mount --bind {tmp_path}/METADATA {metadata}")
    try:
        process = start(head, tmp_path)
        check_end(
            hosts, process, 1, f"node {other.address} lacks the driver's packages: rich=={found.version} ("
        )
    finally:
        other.die()


OTHER_RAY = "import ray; ray.__version__ = '2.59.0'; from ray.scripts.scripts import main; main()"


def test_a_node_with_another_ray(hosts):
    """Checks what launch.py leaves to Ray: such a node cannot join, and the error names both versions."""
    head, other = hosts
    try:
        code, out, err = other.join(head, ray=(sys.executable, "-c", OTHER_RAY))
        assert code != 0 and "Version mismatch" in err and "Ray: 2.59.0" in err, out + err
    finally:
        other.die()
