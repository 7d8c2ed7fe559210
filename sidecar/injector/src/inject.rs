//! Changes a pod as wished: purely, and so that doing it twice is doing it once.
//!
//! The pod stays JSON, since what we do not know of must come out as it went in.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    parts::{
        self, FETCHED_VOLUME, MODELS_VOLUME, NODE_MODELS, SIDECAR, SIDECAR_URL, SLOT, SOCKET_FOLDER, SOCKET_VOLUME,
    },
    settings::{Selector, Settings},
    wish::{Mode, STATUS, Transport, Wish},
};

/// A pod that is no pod.
#[derive(Debug, thiserror::Error)]
pub enum NoPod {
    /// A part of it has the wrong kind.
    #[error("{0} is no {1}")]
    Kind(&'static str, &'static str),
    /// A part of ours cannot be written.
    #[error("a part of the sidecar cannot be written: {0}")]
    Part(#[from] serde_json::Error),
}

/// Names that platforms put on pods, best first.
const NAMES: [&str; 6] = [
    "serving.knative.dev/service",
    "faas_function",
    "serving.kserve.io/inferenceservice",
    "app.kubernetes.io/name",
    "app",
    "name",
];

/// The pod with what it wishes for.
pub fn inject(pod: &Value, namespace: &str, wish: &Wish, settings: &Settings) -> Result<Value, NoPod> {
    let transport = wish.transport.unwrap_or(settings.transport);
    let function = wish.function.clone().unwrap_or_else(|| format!("{namespace}/{}", name_of(pod)));
    let is_knative = label(pod, "serving.knative.dev/service").is_some();
    let mut pod = pod.as_object().ok_or(NoPod::Kind("the pod", "object"))?.clone();
    let spec = object(&mut pod, "spec")?;
    if wish.mode == Mode::Side {
        put_sidecar(spec, wish, settings, &function, transport, is_knative)?;
    }
    for container in array(spec, "containers")? {
        let container = container.as_object_mut().ok_or(NoPod::Kind("a container", "object"))?;
        let name = container.get("name").and_then(Value::as_str).unwrap_or_default();
        if name != SIDECAR && name != "queue-proxy" && name != "istio-proxy" {
            reach(container, wish.mode, transport, &function)?;
        }
    }
    put_volumes(spec, wish, transport)?;
    place(spec, transport, settings)?;
    let status = json!({"mode": if wish.mode == Mode::Side { "side" } else { "mount" }, "function": function});
    object(object(&mut pod, "metadata")?, "annotations")?.insert(STATUS.to_owned(), status.to_string().into());
    Ok(Value::Object(pod))
}

fn label<'a>(pod: &'a Value, name: &str) -> Option<&'a str> {
    pod["metadata"]["labels"][name].as_str()
}

/// What the pod's function is called: by its platform, else what its owner made names from.
fn name_of(pod: &Value) -> String {
    let metadata = &pod["metadata"];
    let given = NAMES.iter().find_map(|name| label(pod, name));
    let given = given.or_else(|| metadata["name"].as_str()).or_else(|| metadata["generateName"].as_str());
    given.unwrap_or("function").trim_end_matches('-').to_owned()
}

fn put_sidecar(
    spec: &mut Map<String, Value>,
    wish: &Wish,
    settings: &Settings,
    function: &str,
    transport: Transport,
    is_knative: bool,
) -> Result<(), NoPod> {
    let image = wish.image.as_deref().unwrap_or(&settings.sidecar_image);
    let mut sidecar = parts::sidecar(wish, image, function, transport);
    let is_in = |spec: &Map<String, Value>, place: &str| {
        spec.get(place).and_then(Value::as_array).into_iter().flatten().any(|container| container["name"] == SIDECAR)
    };
    if is_in(spec, "containers") {
        return Ok(());
    }
    let native = is_in(spec, "initContainers");
    if native || settings.native_sidecar {
        sidecar.restart_policy = Some("Always".to_owned());
        put_native(array(spec, "initContainers")?, value(&sidecar)?, wish.model_volume.is_some());
    } else {
        sidecar.lifecycle = is_knative.then(parts::until_knative_drained);
        array(spec, "containers")?.push(value(&sidecar)?);
    }
    Ok(())
}

/// Before the others, whose work may need it; but behind them where one of them fetches its model.
fn put_native(containers: &mut Vec<Value>, sidecar: Value, is_fetched: bool) {
    let there = containers.iter().position(|container| container["name"] == SIDECAR);
    match (there, is_fetched) {
        (None, false) => containers.insert(0, sidecar),
        (None, true) => containers.push(sidecar),
        (Some(_), false) => {}
        // Another webhook came between: KServe's, with its storage initializer.
        (Some(at), true) => {
            let sidecar = containers.remove(at);
            containers.push(sidecar);
        }
    }
}

/// Tells a container where inference is, or gives it the way to the broker.
fn reach(container: &mut Map<String, Value>, mode: Mode, transport: Transport, function: &str) -> Result<(), NoPod> {
    let variables = match mode {
        Mode::Side => vec![parts::variable("FAASWAP_SIDECAR_URL", SIDECAR_URL)],
        Mode::Mount => vec![parts::variable("FAASWAP_FUNCTION", function), parts::field("HOST_IP", "status.hostIP")],
    };
    for variable in variables {
        // The function's own word counts.
        ensure(array(container, "env")?, &variable.name.clone(), &variable)?;
    }
    match (mode, transport) {
        (Mode::Side, _) | (Mode::Mount, Transport::Tcp) => {}
        (Mode::Mount, Transport::Uds) => {
            ensure(array(container, "volumeMounts")?, SOCKET_VOLUME, &parts::mount(SOCKET_VOLUME, SOCKET_FOLDER))?;
        }
        (Mode::Mount, Transport::Slot) => {
            let limits = object(object(container, "resources")?, "limits")?;
            limits.entry(SLOT).or_insert_with(|| "1".into());
        }
    }
    Ok(())
}

fn put_volumes(spec: &mut Map<String, Value>, wish: &Wish, transport: Transport) -> Result<(), NoPod> {
    if wish.mode == Mode::Side && wish.fetches {
        ensure(array(spec, "volumes")?, FETCHED_VOLUME, &parts::empty(FETCHED_VOLUME))?;
    }
    if transport != Transport::Uds {
        return Ok(());
    }
    let volumes = array(spec, "volumes")?;
    ensure(volumes, SOCKET_VOLUME, &parts::host_path(SOCKET_VOLUME, SOCKET_FOLDER))?;
    if wish.mode == Mode::Side && wish.model_volume.is_none() {
        ensure(volumes, MODELS_VOLUME, &parts::host_path(MODELS_VOLUME, NODE_MODELS))?;
    }
    Ok(())
}

/// Sends the pod to nodes with a broker. Slots do that by themselves.
fn place(spec: &mut Map<String, Value>, transport: Transport, settings: &Settings) -> Result<(), NoPod> {
    let toleration = value(&parts::toleration())?;
    let tolerations = array(spec, "tolerations")?;
    if !tolerations.contains(&toleration) {
        tolerations.push(toleration);
    }
    match (&settings.node_selector, transport) {
        (Selector::Label { key, value }, Transport::Uds | Transport::Tcp) => {
            object(spec, "nodeSelector")?.entry(key).or_insert_with(|| value.as_str().into());
        }
        (Selector::Off, _) | (Selector::Label { .. }, Transport::Slot) => {}
    }
    Ok(())
}

fn value(part: &impl Serialize) -> Result<Value, NoPod> {
    Ok(serde_json::to_value(part)?)
}

/// Appends a named part, unless one of that name is there.
fn ensure(list: &mut Vec<Value>, name: &str, part: &impl Serialize) -> Result<(), NoPod> {
    if !list.iter().any(|there| there["name"] == name) {
        list.push(value(part)?);
    }
    Ok(())
}

/// The object under a key; made where there is none.
fn object<'a>(map: &'a mut Map<String, Value>, key: &'static str) -> Result<&'a mut Map<String, Value>, NoPod> {
    let child = map.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = json!({});
    }
    child.as_object_mut().ok_or(NoPod::Kind(key, "object"))
}

fn array<'a>(map: &'a mut Map<String, Value>, key: &'static str) -> Result<&'a mut Vec<Value>, NoPod> {
    let child = map.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = json!([]);
    }
    child.as_array_mut().ok_or(NoPod::Kind(key, "array"))
}

/// The pod's annotations or labels.
pub fn texts(pod: &Value, kind: &str) -> BTreeMap<String, String> {
    let pairs = pod["metadata"][kind].as_object().into_iter().flatten();
    pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
