"""The manifests of launch/gke: what makes a run find its processes, save, and come back; and the entry point."""

import re
import signal

import pytest
from fakes import HOSTILE, ROOT, SAVES

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FOLDER = ROOT / "launch" / "gke"
ENTRYPOINT = "launch/gke/entrypoint.sh"
CHIPS = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}


@pytest.fixture(params=["gpu", "tpu"])
def kind(request):
    return request.param


@pytest.fixture
def manifest(kind):
    (document,) = yaml.safe_load_all((FOLDER / f"{kind}-jobset.yaml").read_text())
    return document


@pytest.fixture
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1, "one job: process ids are the indices of its pods"
    return replicated["template"]["spec"]


@pytest.fixture
def container(job):
    (only,) = job["template"]["spec"]["containers"]
    return only


def test_is_a_jobset_with_a_headless_service_of_its_name(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}


def test_any_failure_restarts_all_pods_but_for_an_error_of_the_user(manifest, job, container):
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never", "which podFailurePolicy demands"
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": codes}]}


def test_there_is_time_to_save(job):
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_every_process_knows_the_others(kind, manifest, job, container):
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    flags = dict(argument.split("=", 1) for argument in container["args"])
    distributed = {"--coordinator_address", "--num_processes", "--process_id"}
    if kind == "tpu":  # GKE tells the pods
        assert not distributed & set(flags)
        topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        width, height = map(int, topology.split("x"))
        assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == width * height
        return
    assert flags["--num_processes"] == str(job["parallelism"])
    values = {entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) == set(values)
    assert values[flags["--process_id"][2:-1]] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert values["JOBSET_NAME"] == "metadata.annotations['jobset.sigs.k8s.io/jobset-name']"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    host = f"$(JOBSET_NAME)-{replicated['name']}-0-0.$(JOBSET_NAME)"
    assert re.fullmatch(re.escape(host) + r":\d+", flags["--coordinator_address"])


def test_no_rights_beyond_those_needed(job, container):
    pod = job["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1000
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("value" not in entry for entry in container.get("env", []))


def test_resources_and_what_is_written(kind, job, container):
    assert container["resources"]["limits"][CHIPS[kind]] > 0
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    assert set(mounts) == set(volumes)
    assert "emptyDir" in volumes["tmp"]
    assert "persistentVolumeClaim" in volumes["runs"]
    flags = dict(argument.split("=", 1) for argument in container["args"])
    assert flags["--workdir"].startswith(mounts["runs"] + "/")


def test_what_must_be_filled_in_is_marked(job, container):
    """And stops the manifest from working as it is."""
    assert container["image"] == "CHANGE-ME"
    assert "--config=CHANGE-ME" in container["args"]
    volumes = {volume["name"]: volume for volume in job["template"]["spec"]["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "CHANGE-ME"


def test_the_image_runs_as_the_manifests_user_and_holds_what_it_starts(job):
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    user, group = (job["template"]["spec"]["securityContext"][name] for name in ("runAsUser", "runAsGroup"))
    assert f"USER {user}:{group}" in lines
    copied = {word.rstrip("/") for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert {"seqboat", "experiments", "configs", "requirements.txt", "launch/gke/entrypoint.sh"} <= copied
    assert all((ROOT / path).exists() for path in copied)
    assert 'ENTRYPOINT ["bash", "/app/entrypoint.sh"]' in lines


@pytest.mark.parametrize("status", [0, 2, 134])
def test_the_entry_point_ends_as_the_training_does(machine, status):
    machine.behave(f"exit {status}")
    assert machine.run(ENTRYPOINT, *HOSTILE)[0] == status
    assert machine.calls("python") == [["-m", "experiments.train", *HOSTILE]]


@pytest.mark.parametrize(("saving", "status"), [("echo saved; exit 0", 143), ("exit 2", 2)])
def test_the_entry_point_does_not_call_an_unfinished_run_completed(machine, saving, status):
    machine.behave(SAVES.replace("echo saved; exit 0", saving))
    with machine.start(ENTRYPOINT) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("saved" in output) == (status == 143)
