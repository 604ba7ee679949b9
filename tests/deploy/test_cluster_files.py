"""The files for `ray up`: Ray's own validation, our rules, and the commands run where they can be."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parent.parent.parent
AWS, GCP = ROOT / "cluster.yaml", ROOT / "deploy" / "cluster-gcp.yaml"
LOCAL = ROOT / "deploy" / "cluster-local.yaml"
COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# What Ubuntu's own ~/.bashrc begins with.
UBUNTU_BASHRC = "case $- in *i*) ;; *) return;; esac\n"

both = pytest.mark.parametrize("path", [AWS, GCP], ids=lambda path: path.name)
every_file = pytest.mark.parametrize("path", [AWS, GCP, LOCAL], ids=lambda path: path.name)


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(path: Path) -> list[str]:
    return [command for key in COMMANDS for command in load(path).get(key, [])]


def command_with(path: Path, text: str) -> str:
    [command] = [command for command in commands(path) if text in command]
    return command


def start_options(path: Path, key: str) -> dict:
    line = load(path)[key][-1].split("; ")[-1]
    words = shlex.split(line)
    assert words[:2] == ["ray", "start"]
    return ray_start.make_context("ray start", words[2:]).params


def as_ray_runs_it(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    line = " ".join(_with_interactive(command))
    return subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=30)


def without_tools(command: str) -> subprocess.CompletedProcess[str]:
    """Runs it where nothing but the shell is found: what would touch this machine can't."""
    return subprocess.run(
        ["/bin/bash", "-c", command], env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=30
    )


@every_file
def test_ray_finds_the_file_valid(path):
    validate_config(prepare_config(load(path)))


def test_rays_validation_refuses_an_unknown_key():
    config = prepare_config(load(AWS))
    with pytest.raises(Exception, match="max_wokers"):
        validate_config({**config, "max_wokers": 8})


def errors_of_a_launch(node_config: dict) -> str:
    session = pytest.importorskip("botocore.session", reason="needs AWS's own description of its API")
    validate = pytest.importorskip("botocore.validate")
    model = session.get_session().get_service_model("ec2").operation_model("RunInstances")
    launch = {**node_config, "MinCount": 1, "MaxCount": 1}
    return validate.ParamValidator().validate(launch, model.input_shape).generate_report()


@pytest.mark.parametrize("node_type", ["head", "actors"])
def test_aws_knows_every_field_of_a_machine(node_type):
    machine = load(AWS)["available_node_types"][node_type]["node_config"]
    assert errors_of_a_launch(machine) == ""
    assert "HttpToken" in errors_of_a_launch({**machine, "MetadataOptions": {"HttpToken": "required"}})


@every_file
def test_the_dashboard_is_for_the_head_alone(path):
    assert "--dashboard-host=127.0.0.1" in load(path)["head_start_ray_commands"][-1].split()
    assert "0.0.0.0" not in path.read_text(encoding="utf-8")


@both
def test_rays_start_commands_are_what_ray_knows(path):
    head = start_options(path, "head_start_ray_commands")
    worker = start_options(path, "worker_start_ray_commands")
    assert head["head"] and head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert worker["object_manager_port"] == head["object_manager_port"]


@both
def test_the_head_offers_as_many_cpus_as_its_type_declares(path):
    config = load(path)
    declared = config["available_node_types"][config["head_node_type"]]["resources"]
    assert start_options(path, "head_start_ray_commands")["num_cpus"] == declared["CPU"]
    assert declared["GPU"] == 1


@both
def test_actors_machines_come_and_go_within_limits(path):
    config = load(path)
    [(_, actors)] = [item for item in config["available_node_types"].items() if item[0] != "head"]
    assert actors["min_workers"] == 0
    assert 0 < actors["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    assert "SPOT" in str(actors["node_config"]).upper()


@every_file
def test_the_token_travels_by_itself_and_is_asked_for(path):
    assert load(path)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "'export RAY_AUTH_MODE=token'" in command_with(path, "RAY_AUTH_MODE")


@both
def test_the_token_is_for_its_owner(path):
    assert "chmod 600 ~/.ray/auth_token" in load(path)["setup_commands"]


@both
def test_what_is_copied_is_there(path):
    for remote, local in load(path)["file_mounts"].items():
        if local.startswith("./"):
            assert (ROOT / local).exists()
            assert remote == "~/muzero/" + local.removeprefix("./")


@every_file
def test_no_command_holds_a_comment_or_stops_to_ask(path):
    for command in commands(path):
        assert " #" not in command and "\n" not in command
        assert subprocess.run(["bash", "-n", "-c", f"({command})"], check=False).returncode == 0
        assert "apt-get" not in command or " -yq " in command


@both
def test_every_shell_of_ray_knows_token_mode_path_and_runs_folder(path, tmp_path):
    (tmp_path / ".bashrc").write_text(UBUNTU_BASHRC, encoding="utf-8")
    command = command_with(path, "RAY_AUTH_MODE")
    for _ in range(2):
        done = as_ray_runs_it(command, tmp_path)
        assert done.returncode == 0, done.stderr
    seen = as_ray_runs_it('echo "$RAY_AUTH_MODE $DISTRIBUTED_MUZERO_RUNS_DIR $PATH"', tmp_path).stdout.split()
    assert seen[:2] == ["token", "/mnt/runs"]
    assert seen[2].startswith(f"{tmp_path}/venv/bin:")
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8").count("distributed_muzero.sh") == 1


@both
def test_a_runs_folder_that_is_not_filled_in_says_so_at_once(path):
    done = without_tools(command_with(path, "mount -t"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path.name}: the runs folder needs")
    assert "FILL_IN" in done.stderr


@both
def test_a_runs_folder_that_is_filled_in_goes_on_to_the_mount(path):
    assignment, rest = command_with(path, "mount -t").split("; ", 1)
    done = without_tools(f"{assignment.split('=')[0]}=fs-0123; {rest}")
    assert done.returncode != 0
    assert "sudo" in done.stderr and "the runs folder needs" not in done.stderr


@both
@pytest.mark.parametrize("failures", [0, 2, 1000])
def test_package_lists_that_are_locked_are_waited_for_but_not_for_ever(path, failures, tmp_path):
    calls = tmp_path / "calls"
    tools = {
        "sudo": f"""echo "$*" >> {calls}; case "$*" in
            *update*) [ $(grep -c update {calls}) -gt {failures} ];; esac""",
        "sleep": f"echo sleep >> {calls}",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", f"({command_with(path, 'apt-get')})"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    lines = calls.read_text(encoding="utf-8").splitlines()
    updates, last = sum("update" in line for line in lines), lines[-1]
    if failures < 10:
        assert (done.returncode, updates) == (0, failures + 1)
        assert last.startswith("apt-get -o DPkg::Lock::Timeout=300 install -yq python3-venv")
    else:
        assert done.returncode == 1 and 5 < updates < 60 and "install" not in last


def test_google_s_machines_have_a_disk_type_that_they_take():
    config = load(GCP)
    zone = config["provider"]["availability_zone"]
    for machine in config["available_node_types"].values():
        [disk] = machine["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"


@both
def test_a_machine_with_another_python_is_refused(path):
    command = command_with(path, "version_info").replace("python3", shlex.quote(sys.executable), 1)
    assert subprocess.run(["bash", "-c", command], timeout=30).returncode == 0
    refused = subprocess.run(
        ["bash", "-c", command.replace("(3, 11) <=", "(4, 0) <=")], capture_output=True, text=True, timeout=30
    )
    assert refused.returncode == 1
    assert "Ubuntu 24.04" in refused.stderr


@both
@pytest.mark.parametrize("role", ["head", "worker"])
def test_torch_is_installed_first_and_all_under_the_constraints(path, role):
    installs = [command for command in load(path)[f"{role}_setup_commands"] if "pip install" in command]
    assert all("-c constraints.txt" in command for command in installs)
    first, project = installs
    assert first.endswith(" torch")
    assert "-e '.[box2d,openspiel,pettingzoo,mathy]'" in project


def test_the_mount_is_in_the_provider_s_region():
    assert f".efs.{load(AWS)['provider']['region']}.amazonaws.com:/" in command_with(AWS, "mount -t")


def test_both_clouds_are_set_up_alike_but_for_the_runs_folder():
    for key in COMMANDS:
        for aws, gcp in zip(load(AWS)[key], load(GCP)[key], strict=True):
            if "mount -t" not in aws:
                assert aws.split(" 'boto3")[0] == gcp.split(" 'google-api")[0]
    assert load(AWS)["file_mounts"] == load(GCP)["file_mounts"]
