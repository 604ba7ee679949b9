"""Boots hosts out of Linux namespaces, and cuts their power. To be used inside `tests.isolation`, as root."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.isolation import in_namespaces
from tests.processes import wait_for

SCRIPT = Path(__file__).with_name("host.sh")
SSH_OPTIONS = (
    "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=5"
)
BRIDGE, GATEWAY = "hosts", "10.214.0.1"


class Network:
    """A bridge, with the operator's own end of it (GATEWAY), and the hosts that are plugged in.

    `folder` gets a folder for each host (home, log of sshd) and `key`, which opens root's account on all of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = folder / "key"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        folder.mkdir()
        make_key(self.key)
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def boot(self, name: str, address: str) -> None:
        """Starts a host and waits until it can be reached over ssh."""
        folder = self.folder / name
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (home / ".ssh" / "authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        (home / ".bashrc").touch()
        (folder / "passwd").write_text(
            f"root:x:0:0:root:{home}:/bin/bash\nsshd:x:1:1::/run/sshd:/bin/false\n"
        )
        make_key(folder / "key")
        host = in_namespaces([str(SCRIPT), name, address, GATEWAY, str(folder)])
        with (folder / "sshd.log").open("w") as log:
            self.processes[name] = process = subprocess.Popen(
                host, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        wait_for(f"{name} to boot", (folder / "booted").exists, timeout=20)
        ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        ip("link", "set", f"to-{name}", "master", BRIDGE, "up")
        wait_for(f"ssh to {name}", lambda: self.ssh(address, "true").returncode == 0, timeout=20)

    def ssh(self, address: str, command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        return subprocess.run(
            ["ssh", "-i", str(self.key), *SSH_OPTIONS.split(), f"root@{address}", command],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def cut_power(self, name: str) -> None:
        """All its processes die at once, and nobody gets a last packet from it."""
        ip("link", "set", f"to-{name}", "down")
        self.processes[name].kill()
        self.processes[name].communicate(timeout=20)


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)
