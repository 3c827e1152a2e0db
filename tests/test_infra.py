"""infra/: the manifests fit their schemas and each other, the nightly starter creates one RayJob a night."""

import copy
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.error
import venv
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dailies.infra.nightly import ENDED, OURS, Api, start_tonight

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
DATE = "2026-01-31"
KUBERNETES = kubernetes_validate.latest_version()


def obj(required: list[str] | None = None, **properties) -> dict:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": required or [], "additionalProperties": False}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD_TEMPLATE = obj(["spec"], metadata={"type": "object"}, spec={"type": "object"})    # inside: Kubernetes' own schema

# The fields of ray.io/v1 as KubeRay 1.7.0's API reference lists them: names, types, enumerations. What its operator
# refuses beyond the CRD (validation.go) is in test_the_operator_would_accept_it.
RAY_CLUSTER = obj(
    ["headGroupSpec"],
    authOptions=obj(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG, headServiceAnnotations=TEXTS, rayVersion=TEXT, suspend=FLAG,
    headGroupSpec=obj(["template"], template=POD_TEMPLATE, rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS,
                      serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, enableIngress=FLAG),
    workerGroupSpecs={"type": "array", "items": obj(
        ["groupName", "template"], groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, suspend=FLAG,
        numOfHosts=POSITIVE, idleTimeoutSeconds=COUNT, priority={"type": "integer"}, rayStartParams=TEXTS,
        resources=TEXTS, labels=TEXTS, template=POD_TEMPLATE)},
)
RAY_JOB = obj(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"},
    metadata=obj(["name"], name={"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 47},
                 labels=TEXTS, annotations=TEXTS, namespace=TEXT),
    spec=obj(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, clusterSelector=TEXTS,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate=POD_TEMPLATE, submitterConfig=obj(backoffLimit=COUNT),
        entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
        activeDeadlineSeconds=POSITIVE, preRunningDeadlineSeconds=POSITIVE, backoffLimit=COUNT,
        ttlSecondsAfterFinished=COUNT, shutdownAfterJobFinishes=FLAG, suspend=FLAG, rayClusterSpec=RAY_CLUSTER),
)


def documents(name: str) -> list[dict]:
    text = (INFRA / name).read_text(encoding="utf-8")
    return [each for each in yaml.safe_load_all(text.replace("{date}", DATE)) if each]


@pytest.fixture
def rayjob() -> dict:
    [job] = documents("rayjob.yaml")
    return copy.deepcopy(job)       # YAML anchors share objects; a test that changes one must not change all


def groups(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_templates(job: dict) -> list[dict]:
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups(job))]


def pod(template: dict) -> dict:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})},
            "spec": template["spec"]}


def test_the_rayjob_fits_the_crd(rayjob):
    jsonschema.validate(rayjob, RAY_JOB)


def test_its_pods_fit_kubernetes(rayjob):
    for template in pod_templates(rayjob):
        kubernetes_validate.validate(pod(template), KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["cluster.yaml", "nightly.yaml"])
def test_the_other_manifests_fit_kubernetes(name):
    assert documents(name)
    for each in documents(name):
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("spoil", [
    lambda job: job["spec"].update(entryPoint="x"),
    lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="open"),
    lambda job: job["spec"].update(backoffLimit="1"),
    lambda job: job["metadata"].update(name="2026-dailies"),
    lambda job: groups(job)[1].update(replicas=-1),
    lambda job: groups(job)[0]["rayStartParams"].update({"num-cpus": 0}),
    lambda job: groups(job)[0].pop("template"),
])
def test_the_crd_check_catches_a_mistake(rayjob, spoil):
    spoil(rayjob)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rayjob, RAY_JOB)


def test_the_pod_check_catches_a_mistake(rayjob):
    template = groups(rayjob)[2]["template"]
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod(template), KUBERNETES, strict=True)


def test_the_operator_would_accept_it(rayjob):
    """What KubeRay 1.7.0's operator checks and the CRD does not say, for the fields that are used here."""
    spec = rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)      # token authentication needs it
    assert not spec.get("ttlSecondsAfterFinished") or spec["shutdownAfterJobFinishes"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", group["groupName"])
    for group in groups(rayjob):
        assert group["template"]["spec"]["containers"]
        assert "labels" not in group["rayStartParams"]
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_the_cluster_has_cpu_writers_and_gpu_samplers(rayjob):
    head, writers, samplers = groups(rayjob)
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
            for group in (head, writers, samplers)]
    assert (writers["groupName"], samplers["groupName"]) == ("writers", "samplers")
    assert gpus == [0, 0, 1]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_ray_asks_for_a_token_and_its_dashboard_is_not_exposed(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    everything = [each for name in ("cluster.yaml", "nightly.yaml") for each in documents(name)]
    assert not [each for each in everything if each["kind"] in ("Ingress", "Service")]


def test_the_wall_stands_around_every_ray_pod(rayjob):
    [policy] = [each for each in documents("cluster.yaml") if each["kind"] == "NetworkPolicy"]
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for template in pod_templates(rayjob):
        assert selected <= template["metadata"]["labels"].items()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": dict(selected)}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_no_pod_has_more_rights_than_it_uses(rayjob):
    [nightly] = [each for each in documents("nightly.yaml") if each["kind"] == "CronJob"]
    [role] = [each for each in documents("nightly.yaml") if each["kind"] == "Role"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["list", "create"]}]
    templates = [*pod_templates(rayjob), nightly["spec"]["jobTemplate"]["spec"]["template"]]
    for template in templates:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not [each for each in container.get("env", []) if "value" in each], "settings come from the image"
    for template in pod_templates(rayjob):
        assert template["spec"]["automountServiceAccountToken"] is False


def test_names_agree_across_the_files(rayjob):
    cron, account, role, binding = documents("nightly.yaml")
    [settings] = documents("kustomization.yaml")
    template = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    accounts = {each["metadata"]["name"] for name in ("cluster.yaml", "nightly.yaml") for each in documents(name)
                if each["kind"] == "ServiceAccount"}
    pods = [template, *(group["template"]["spec"] for group in groups(rayjob))]
    assert {each["serviceAccountName"] for each in pods} == accounts
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert all((INFRA / name).is_file() for name in settings["resources"])
    [generated] = settings["configMapGenerator"]
    assert template["volumes"][0]["configMap"]["name"] == generated["name"]
    assert template["containers"][0]["command"][-1].endswith(f"/{generated['files'][0]}")
    pods += [rayjob["spec"]["submitterPodTemplate"]["spec"]]
    images = {container["image"] for each in pods for container in each["containers"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert images == {f"dailies:{project['version']}"}
    assert f"ray=={rayjob['spec']['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_a_new_night_waits_for_the_last(rayjob):
    [cron] = [each for each in documents("nightly.yaml") if each["kind"] == "CronJob"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    key, _, value = OURS.partition("=")         # how the starter finds last night's
    assert rayjob["metadata"]["labels"][key] == value


def test_the_entrypoint_is_a_command_that_exists(rayjob):
    program, command, *rest = rayjob["spec"]["entrypoint"].split()
    assert (program, command) == ("dailies", "render")
    assert rest[-2:] == ["--ray", "auto"] and DATE in rest[0]
    done = subprocess.run([sys.executable, "-m", "dailies", command, "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    for flag in (word for word in rest if word.startswith("--")):
        assert flag in done.stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_it():
    built = subprocess.run(["kubectl", "kustomize", str(INFRA)], capture_output=True, text=True, check=True).stdout
    kinds = {each["kind"] for each in yaml.safe_load_all(built)}
    assert kinds == {"ConfigMap", "CronJob", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount"}


class ApiServer(http.server.ThreadingHTTPServer):
    """The two calls of the Kubernetes API that the starter makes, over real HTTP: list by label, create by name."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    PATH = "/apis/ray.io/v1/namespaces/nights/rayjobs"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path != self.PATH or self.headers["Authorization"] != "Bearer key":
            return self.answer(403, {"message": "forbidden"})
        key, _, value = query.removeprefix("labelSelector=").partition("=")
        jobs = [job for job in self.server.jobs.values() if job["metadata"]["labels"].get(key) == value]
        self.answer(200, {"items": jobs})

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        if self.headers["Authorization"] != "Bearer key":
            return self.answer(403, {"message": "forbidden"})
        if name in self.server.jobs:
            return self.answer(409, {"message": "already exists"})
        self.server.jobs[name] = job
        self.answer(201, job)

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ApiServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


TEMPLATE = (INFRA / "rayjob.yaml").read_text(encoding="utf-8")


def test_the_starter_creates_tonights_rayjob_once(server):
    api = Api(server.url, "nights", "key")
    assert start_tonight(api, TEMPLATE, DATE) == f"created dailies-{DATE}"
    created = server.jobs[f"dailies-{DATE}"]
    jsonschema.validate(created, RAY_JOB)
    assert f"runs/{DATE}" in created["spec"]["entrypoint"] and "{date}" not in json.dumps(created)
    created["status"] = {"jobDeploymentStatus": "Complete"}
    assert start_tonight(api, TEMPLATE, DATE) == f"not started: dailies-{DATE} exists already"
    assert start_tonight(api, TEMPLATE, "2026-02-01") == "created dailies-2026-02-01"


@pytest.mark.parametrize("status", [{}, {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Retrying"}])
def test_the_starter_leaves_a_running_night_alone(server, status):
    api = Api(server.url, "nights", "key")
    start_tonight(api, TEMPLATE, DATE)
    server.jobs[f"dailies-{DATE}"]["status"] = status
    assert start_tonight(api, TEMPLATE, "2026-02-01") == f"not started: dailies-{DATE} still runs"
    assert len(server.jobs) == 1
    for ended in ENDED:
        server.jobs[f"dailies-{DATE}"]["status"] = {"jobDeploymentStatus": ended}
        assert api.running() == []


def test_the_starter_says_when_it_is_not_allowed(server):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        start_tonight(Api(server.url, "nights", "wrong"), TEMPLATE, DATE)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    parts = [line.partition(" ") for line in text.splitlines() if line]
    return [(word.upper(), rest.strip()) for word, _, rest in parts]


def test_the_image_is_built_from_what_is_there():
    known = {"ARG", "FROM", "RUN", "WORKDIR", "ENV", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known
    for word, rest in instructions():
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert copied >= {"kernels", "model", "actors", "pipeline", "jobs", "infra", "pyproject.toml", "constraints.txt"}
    left_out = {line.strip("/").removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert left_out >= {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}


def test_the_image_pins_its_parts_and_runs_as_nobody_special():
    words = dict(instructions())
    base = re.fullmatch(r"BASE=(\S+):(\S+)", words["ARG"])
    assert base and base[2] != "latest"
    assert words["FROM"] == "${BASE}"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", words["USER"]), "a number, so that runAsNonRoot can be checked"
    order = [word for word, _ in instructions()]
    assert order.index("USER") > max(index for index, word in enumerate(order) if word in ("RUN", "COPY"))
    assert json.loads(words["ENTRYPOINT"]) == ["dailies"]
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert installs and all("--constraint constraints.txt" in each or "--no-deps" in each for each in installs)


def test_what_a_login_shell_finds_in_the_image_is_what_lies_in_its_environment(tmp_path):
    """PATH is forgotten there; `dailies submit` starts its job with `python`."""
    venv.create(tmp_path / "venv", symlinks=True)
    (tmp_path / "bin").mkdir()
    last = [rest for word, rest in instructions() if word == "RUN"][-1].replace("/venv", f"{tmp_path}/venv")
    _, *steps = last.replace("/usr/local/bin", f"{tmp_path}/bin").split("&&")
    subprocess.run(["sh", "-c", "&&".join(steps)], check=True)
    said = subprocess.run([tmp_path / "bin/python", "-c", "import sys; print(sys.prefix, *sys.argv[1:])", "a b", "c"],
                          capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert said.stdout == f"{tmp_path}/venv a b c\n"
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {"python", "ray", "dailies"}


def test_the_image_holds_no_secret():
    for word, rest in instructions():
        if word in ("ARG", "ENV"):
            assert not re.search(r"(?i)(token|secret|password|key)\w*\s*=", rest), rest
        assert word != "ADD"
