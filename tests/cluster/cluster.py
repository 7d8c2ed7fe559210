"""A cluster of one node: etcd, Kubernetes' own programs, containerd. Everything is in the namespaces that `run` has made.

Certificates are the API server's own; components have tokens. Each is who it is in a real cluster, so roles are enforced."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import yaml

from node import Process

BIN = pathlib.Path(os.environ.get("FAASWAP_CLUSTER_BIN", ""))
NODE, ADDRESS = "node1", "10.11.0.1"
API = f"https://{ADDRESS}:6443"
SERVICES, PODS = "10.96.0.0/16", "10.88.0.0/16"
DOMAIN = "cluster.local"
CONTAINERD = "/run/containerd/containerd.sock"
PAUSE = "faaswap.test/pause:1"
# Who holds which token, and in which groups.
USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "dns": ("system:kube-dns", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
}
# Nothing here is about time: this is when to give up.
WITHIN_S = 180
POLL_S = 0.25


def say(text):
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def until(what, condition, within=WITHIN_S):
    """The first answer that is not empty; an exception on the way counts as none."""
    give_up, answer = time.monotonic() + within, None
    while time.monotonic() < give_up:
        try:
            answer = condition()
            if answer:
                return answer
        except (AssertionError, OSError, KeyError, IndexError, subprocess.SubprocessError) as error:
            answer = error
        time.sleep(POLL_S)
    raise AssertionError(f"not within {within} s: {what}; at last: {answer!r}")


class Cluster:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.processes = {}
        self.configs = {name: self._kubeconfig(name) for name in USERS}

    def _kubeconfig(self, name):
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": API, "certificate-authority": f"{self.folder}/pki/apiserver.crt"}}],
            "users": [{"name": "it", "user": {"token": f"token-of-{name}"}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }))
        return path

    def run(self, name, *command):
        log = len(list(self.folder.glob(f"{name}*.log")))
        path = f"{BIN}:{os.environ['PATH']}"
        process = Process(name if not log else f"{name}-{log}", [*map(str, command)], self.folder, {"PATH": path})
        self.processes[name] = process
        return process

    def stop(self, name):
        self.processes.pop(name).end()

    def log(self, name):
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}*.log")))

    def kubectl(self, *arguments, given=None, check=True, who="admin", config=None):
        command = [BIN / "kubectl", f"--kubeconfig={config or self.configs[who]}", *map(str, arguments)]
        if given is not None and not isinstance(given, str):
            given = yaml.safe_dump_all(given if isinstance(given, list) else [given])
        done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", timeout=WITHIN_S)
        assert not check or done.returncode == 0, f"kubectl {arguments}\n{done.stdout}{done.stderr}"
        return done

    def get(self, *arguments):
        return json.loads(self.kubectl("get", "-o", "json", *arguments).stdout)

    def start_control_plane(self):
        pki, token_file, key = self.folder / "pki", self.folder / "tokens.csv", self.folder / "service-accounts.key"
        token_file.write_text("".join(f'token-of-{name},{user},{name},"{groups}"\n' for name, (user, groups) in USERS.items()))
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        say("etcd and the API server start")
        self.run("etcd", BIN / "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--log-level=warn")
        self.run(
            "apiserver", BIN / "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", f"--cert-dir={pki}",
            f"--advertise-address={ADDRESS}", "--bind-address=0.0.0.0", "--secure-port=6443",
            f"--service-cluster-ip-range={SERVICES}", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            f"--token-auth-file={token_file}", "--allow-privileged=true", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        )
        until("the API server is ready", lambda: self.kubectl("get", "--raw", "/readyz").stdout == "ok")
        say(f"the API server is ready: {self.version()}")
        self.run(
            "controller-manager", BIN / "kube-controller-manager", f"--kubeconfig={self.configs['controller-manager']}",
            "--leader-elect=false", "--use-service-account-credentials=true", f"--service-account-private-key-file={key}",
            f"--root-ca-file={pki}/apiserver.crt",
        )
        self.run("scheduler", BIN / "kube-scheduler", f"--kubeconfig={self.configs['scheduler']}", "--leader-elect=false")
        until("namespaces have service accounts", lambda: self.get("serviceaccount", "default", "-n", "default"))

    def version(self):
        return json.loads(self.kubectl("get", "--raw", "/version").stdout)["gitVersion"]

    def start_node(self, images):
        self._start_containerd()
        for archive in images:
            self.ctr("images", "import", archive)
        self._configure_kubelet()
        self.start_kubelet()
        proxy = self.folder / "proxy.yaml"
        proxy.write_text(yaml.safe_dump({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "iptables",
            "clusterCIDR": PODS, "clientConnection": {"kubeconfig": str(self.configs["proxy"])}, "hostnameOverride": NODE,
            # The machine's table of connections is not this cluster's to size.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }))
        self.run("proxy", BIN / "kube-proxy", f"--config={proxy}")
        self._start_dns()
        until("the node is ready", self.node_is_ready)
        say("the node is ready")

    def _start_dns(self):
        rules = [{"apiGroups": [group], "resources": what, "verbs": ["list", "watch"]} for group, what in (
            ("", ["services", "namespaces", "pods"]), ("discovery.k8s.io", ["endpointslices"]),
        )]
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USERS["dns"][0]}
        kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "dns"}}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "dns"}
        self.kubectl("apply", "-f", "-", given=[
            {**kind, "kind": "ClusterRole", "rules": rules},
            {**kind, "kind": "ClusterRoleBinding", "roleRef": role, "subjects": [subject]},
        ])
        corefile = self.folder / "Corefile"
        corefile.write_text(f""".:53 {{
    bind {ADDRESS}
    errors
    kubernetes {DOMAIN} {{
        kubeconfig {self.configs["dns"]}
        ttl 1
    }}
}}
""")
        self.run("dns", BIN / "coredns", "-conf", corefile)

    def node_is_ready(self):
        conditions = self.get("node", NODE)["status"]["conditions"]
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def ctr(self, *arguments):
        command = ["ctr", f"--address={CONTAINERD}", "--namespace=k8s.io", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def _start_containerd(self):
        networks = self.folder / "net.d"
        networks.mkdir()
        (networks / "10-pods.conflist").write_text(json.dumps({
            "cniVersion": "1.0.0", "name": "pods", "plugins": [{
                "type": "ptp", "ipMasq": False,
                "ipam": {
                    "type": "host-local", "dataDir": f"{self.folder}/addresses", "ranges": [[{"subnet": PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        }))
        config = self.folder / "containerd.toml"
        config.write_text(f"""
version = 2
root = "{self.folder}/containerd"
state = "/run/containerd"
[grpc]
address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# A root that may not lower it would start nothing.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{BIN}/cni"
conf_dir = "{networks}"
""")
        say("containerd starts")
        self.run("containerd", "containerd", "--config", config)
        until("containerd answers", lambda: self.ctr("version"))

    def _configure_kubelet(self):
        (self.folder / "kubelet.yaml").write_text(yaml.safe_dump({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{CONTAINERD}", "cgroupDriver": "cgroupfs",
            # Machines with the older cgroups do too, for now.
            "failCgroupV1": False, "failSwapOn": False,
            # Only the API server is here to ask it, without a certificate of its own.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            # How full the machine's disk is, is not the tests' to judge.
            "evictionHard": {f"{what}.available": "0%" for what in ("memory", "nodefs", "imagefs")}, "imageGCHighThresholdPercent": 100,
            "resolvConf": "", "clusterDNS": [ADDRESS], "clusterDomain": DOMAIN,
            "volumePluginDir": f"{self.folder}/volume-plugins", "nodeStatusUpdateFrequency": "2s",
        }))

    def start_kubelet(self):
        say("the kubelet starts")
        self.run(
            "kubelet", BIN / "kubelet", f"--config={self.folder}/kubelet.yaml", f"--kubeconfig={self.configs['kubelet']}",
            f"--hostname-override={NODE}", f"--node-ip={ADDRESS}",
        )

    def keep(self, folder):
        """Copies what components and containers have said, and what there is, for people to read."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for log in self.folder.glob("*.log"):
            shutil.copy(log, folder)
        if pathlib.Path("/var/log/pods").is_dir():
            shutil.copytree("/var/log/pods", folder / "pods", symlinks=True)
        for name, what in (("events", "get events -A -o wide"), ("pods", "describe pods -A"), ("nodes", "describe nodes")):
            (folder / f"{name}.txt").write_text(self.kubectl(*what.split(), check=False).stdout)

    def end(self):
        for name in list(self.processes):
            self.stop(name)
