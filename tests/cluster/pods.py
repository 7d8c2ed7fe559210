"""Functions as users write them."""

FUNCTION_IMAGE = "faaswap/function:test"


def restricted():
    """What Pod Security's `restricted` wants of every container."""
    return {
        "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def annotated(**annotations):
    return {f"faaswap.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}


def pod(name, annotations, labels=None):
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations, "labels": labels or {}},
        "spec": {
            "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 5,
            "containers": [{
                "name": "app", "image": FUNCTION_IMAGE, "ports": [{"containerPort": 8080}], "securityContext": restricted(),
            }],
        },
    }


def deployment(name, annotations, replicas=1):
    labels = {"app.kubernetes.io/name": name}
    template = pod(name, annotations, labels)
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {key: template["metadata"][key] for key in ("annotations", "labels")}, "spec": template["spec"]},
        },
    }


def with_volume(function, name, volume):
    """The Deployment with a volume of its own."""
    function["spec"]["template"]["spec"].setdefault("volumes", []).append({"name": name, **volume})
    return function


def service(name):
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app.kubernetes.io/name": name}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
