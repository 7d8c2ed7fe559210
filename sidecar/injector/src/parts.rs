//! The parts that are put into pods: the sidecar's container, variables, volumes.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction, HostPathVolumeSource,
        Lifecycle, LifecycleHandler, ObjectFieldSelector, Probe, ResourceRequirements, SeccompProfile,
        SecretKeySelector, SecurityContext, Toleration, Volume, VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};

use crate::wish::{Transport, Wish};

/// The name of the sidecar's container.
pub const SIDECAR: &str = "faaswap-sidecar";
/// Where functions find it, in their pod.
pub const SIDECAR_URL: &str = "http://127.0.0.1:9463";
/// What the device plugin counts.
pub const SLOT: &str = "faaswap.dev/slot";
/// Our volume with the broker's socket.
pub const SOCKET_VOLUME: &str = "faaswap-broker";
/// Our volume with the node's models.
pub const MODELS_VOLUME: &str = "faaswap-models";
/// Where the broker's socket lies, on the node and in pods.
pub const SOCKET_FOLDER: &str = "/run/faaswap";
/// Where the node keeps models for pods that bring none.
pub const NODE_MODELS: &str = "/var/lib/faaswap/models";
/// Where the sidecar finds models.
pub const MODELS: &str = "/models";
/// Our volume for a model that the sidecar fetches.
pub const FETCHED_VOLUME: &str = "faaswap-fetched";
/// Where that is.
const FETCHED: &str = "/fetched";
/// The key of a Secret with the value of the Authorization header.
const SECRET_KEY: &str = "authorization";
/// Nobody, by the number that images without users use for it.
const NOBODY: i64 = 65_532;
/// The sidecar's port for probes and metrics.
const PROBES: i32 = 9465;
/// Knative's queue-proxy answers here once requests have drained.
const KNATIVE_DRAIN: i32 = 8022;

/// A variable with a value.
pub fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

/// A variable whose value is a field of the pod.
pub fn field(name: &str, path: &str) -> EnvVar {
    let selector = ObjectFieldSelector { field_path: path.to_owned(), api_version: None };
    let source = EnvVarSource { field_ref: Some(selector), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(source) }
}

/// A variable whose value is in a Secret of the pod's namespace.
fn secret(name: &str, of: &str) -> EnvVar {
    let selector = SecretKeySelector { name: of.to_owned(), key: SECRET_KEY.to_owned(), optional: None };
    let source = EnvVarSource { secret_key_ref: Some(selector), ..EnvVarSource::default() };
    EnvVar { name: name.to_owned(), value: None, value_from: Some(source) }
}

/// A volume that is there as long as its pod.
pub fn empty(name: &str) -> Volume {
    Volume { name: name.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }
}

fn probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    let get = HTTPGetAction { path: Some(path.to_owned()), port: IntOrString::Int(PROBES), ..HTTPGetAction::default() };
    Probe {
        http_get: Some(get),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

fn security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Capabilities::default() }),
        read_only_root_filesystem: Some(true),
        run_as_non_root: Some(true),
        run_as_user: Some(NOBODY),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
        ..SecurityContext::default()
    }
}

fn resources(wish: &Wish, transport: Transport) -> ResourceRequirements {
    let quantities = |pairs: &[(&str, &str)]| {
        Some(
            pairs
                .iter()
                .map(|(name, much)| ((*name).to_owned(), Quantity((*much).to_owned())))
                .collect::<BTreeMap<_, _>>(),
        )
    };
    let slot: &[_] = if transport == Transport::Slot { &[(SLOT, "1")] } else { &[] };
    ResourceRequirements {
        requests: quantities(&[("cpu", wish.cpu.as_str()), ("memory", "16Mi")]),
        limits: quantities(&[&[("memory", wish.memory.as_str())], slot].concat()),
        ..ResourceRequirements::default()
    }
}

/// A mount that cannot be written.
pub fn mount(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    }
}

/// A folder of the node.
pub fn host_path(name: &str, path: &str) -> Volume {
    let source = HostPathVolumeSource { path: path.to_owned(), type_: Some("DirectoryOrCreate".to_owned()) };
    Volume { name: name.to_owned(), host_path: Some(source), ..Volume::default() }
}

/// GPU nodes are often kept free of other pods.
pub fn toleration() -> Toleration {
    Toleration {
        key: Some("nvidia.com/gpu".to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    }
}

/// Lets a container live until Knative's queue-proxy has drained.
pub fn until_knative_drained() -> Lifecycle {
    let get = HTTPGetAction {
        path: Some("/wait-for-drain".to_owned()),
        port: IntOrString::Int(KNATIVE_DRAIN),
        ..HTTPGetAction::default()
    };
    let handler = LifecycleHandler { http_get: Some(get), ..LifecycleHandler::default() };
    Lifecycle { pre_stop: Some(handler), ..Lifecycle::default() }
}

/// The sidecar. It starts before the function and is up once its process is: whether the model is ready is readiness,
/// so that an absent broker delays nobody's start.
pub fn sidecar(wish: &Wish, image: &str, function: &str, transport: Transport) -> Container {
    let mut env = vec![variable("FAASWAP_FUNCTION", function), variable("FAASWAP_LISTEN", "127.0.0.1:9463")];
    env.extend(wish.variables.iter().map(|(name, value)| variable(name, value)));
    env.push(variable("FAASWAP_LOG_FORMAT", "json"));
    env.push(field("HOST_IP", "status.hostIP"));
    let mut mounts = Vec::new();
    if transport == Transport::Uds {
        mounts.push(mount(SOCKET_VOLUME, SOCKET_FOLDER));
    }
    if wish.fetches {
        env.push(variable("FAASWAP_MODEL_DIR", FETCHED));
        mounts.push(VolumeMount { read_only: None, ..mount(FETCHED_VOLUME, FETCHED) });
    }
    env.extend(wish.model_secret.iter().map(|of| secret("FAASWAP_MODEL_AUTH", of)));
    match (&wish.model_volume, transport) {
        (Some(volume), _) => mounts.push(mount(volume, MODELS)),
        (None, Transport::Uds) => mounts.push(mount(MODELS_VOLUME, MODELS)),
        // The device plugin mounts the node's models; over TCP a model is known by its digest.
        (None, Transport::Slot | Transport::Tcp) => {}
    }
    Container {
        name: SIDECAR.to_owned(),
        image: Some(image.to_owned()),
        env: Some(env),
        volume_mounts: (!mounts.is_empty()).then_some(mounts),
        startup_probe: Some(probe("/livez", 1, 30)),
        readiness_probe: Some(probe("/readyz", 5, 3)),
        resources: Some(resources(wish, transport)),
        security_context: Some(security()),
        ..Container::default()
    }
}
